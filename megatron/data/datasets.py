"""Sample i of a corpus, or of several, as token ids: the face every source of training data shows to the batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.data.blend import blend
from megatron.data.indexed import IndexedDataset
from megatron.data.labels import IGNORED, Labels
from megatron.data.order import SampleIndex
from megatron.errors import DataError


@dataclass(frozen=True)
class Sample:
    """Attributes:
    tokens: i64 [seq_length + 1].
    targets: i64 [seq_length + 1], what each token counts as when it is to be predicted, negative where it does not count;
        None: the tokens themselves.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64] | None = None


class Dataset(Protocol):
    """Samples numbered from 0; each has seq_length + 1 tokens, to read and, shifted by one, to predict."""

    @property
    def seq_length(self) -> int:
        """Tokens a sample predicts."""
        ...

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample:
        """Sample `index`; a DataError beyond the end."""
        ...


class TokenDataset:
    """What all datasets share: `dataset[i]` is the tokens (i64 [seq_length + 1]) of `dataset.sample(i)`."""

    seq_length: int

    def __len__(self) -> int:
        raise NotImplementedError

    def sample(self, index: int) -> Sample:
        """Sample `index`; a DataError beyond the end."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        return self.sample(index).tokens


def _check_range(index: int, length: int, where: str) -> None:
    if not 0 <= index < length:
        raise DataError(
            f"sample {index} does not exist",
            where=where,
            why=f"the order was built for {length} samples",
            hint="the run asks for more data than train_iters, eval_iters or the weights promised",
        )


class _OrderedDataset(TokenDataset):
    """A corpus and an order over it, with or without labels."""

    def __init__(
        self, indexed: IndexedDataset, order: SampleIndex, vocab_size: int | None = None, labels: Labels | None = None
    ) -> None:
        indexed.require_integers()
        self.indexed, self.order, self.vocab_size, self.labels = indexed, order, vocab_size, labels
        self.seq_length = order.seq_length

    def __len__(self) -> int:
        return len(self.order)

    def _checked(self, document: int, offset: int, length: int) -> NDArray[np.int64]:
        """Tokens of one piece of a document; a DataError names a token beyond the vocabulary."""
        tokens = self.indexed.get(document, offset, length).astype(np.int64)
        if self.vocab_size is None or len(tokens) == 0:
            return tokens
        if int(tokens.max()) >= self.vocab_size or int(tokens.min()) < 0:
            wrong = int(np.argmax((tokens >= self.vocab_size) | (tokens < 0)))
            first = int(self.indexed.offsets[document]) // self.indexed.dtype.itemsize
            raise self.indexed.wrong_token(first + offset + wrong, int(tokens[wrong]), self.vocab_size)
        return tokens

    def _targets(self, labels: Labels, document: int, offset: int, length: int) -> NDArray[np.int64]:
        targets = labels.indexed.get(document, offset, length).astype(np.int64)
        if self.vocab_size is not None and len(targets) and int(targets.max()) >= self.vocab_size:
            wrong = int(np.argmax(targets >= self.vocab_size))
            first = int(labels.indexed.offsets[document]) // labels.indexed.dtype.itemsize
            raise labels.indexed.wrong_token(first + offset + wrong, int(targets[wrong]), self.vocab_size)
        return targets

    def _read(self, pieces: Sequence[tuple[int, int, int]]) -> Sample:
        """The pieces (document, offset, length) in a row; cut or, with 0 and an ignored target, filled to seq_length + 1."""
        width = self.seq_length + 1
        tokens = np.zeros(width, dtype=np.int64)
        targets = np.full(width, IGNORED, dtype=np.int64)
        at = 0
        for piece in pieces:
            read = self._checked(*piece)
            tokens[at : at + len(read)] = read
            targets[at : at + len(read)] = read if self.labels is None else self._targets(self.labels, *piece)
            at += len(read)
        return Sample(tokens, targets if at < width or self.labels is not None else None)


class PackedDataset(_OrderedDataset):
    """Windows of `seq_length + 1` tokens cut from the shuffled stream of documents.

    Args:
        indexed: the corpus.
        order: which window is sample i (`order.build_sample_index`).
        vocab_size: if given, every sample is checked to hold only ids below it.
        labels: which tokens count; all of them without.

    Raises:
        DataError: the corpus holds no integers; `sample`: no such sample (nothing wraps around), a token beyond the vocabulary.
    """

    def sample(self, index: int) -> Sample:
        """Sample `index`."""
        _check_range(index, len(self), self.indexed.prefix)
        row = int(self.order.shuffle_idx[index])
        place, offset = (int(value) for value in self.order.sample_idx[row])
        pieces, missing = [], self.seq_length + 1
        while missing > 0:
            document = int(self.order.doc_idx[place])
            take = min(int(self.indexed.sizes[document]) - offset, missing)
            pieces.append((document, offset, take))
            missing -= take
            place, offset = place + 1, 0
        return self._read(pieces)


class PaddedDataset(_OrderedDataset):
    """Whole documents, filled with 0 to `seq_length + 1` tokens (`packing.build_padded_index`); arguments as for
    `PackedDataset`.

    As in NeoX the first token of the document after them stands before the padding. No loss is counted on padding (NeoX counts
    it where there are no label files), and the last row of the order is served as it is (NeoX fails there and silently serves
    another sample, or ends in a recursion).
    """

    def sample(self, index: int) -> Sample:
        """Sample `index`."""
        _check_range(index, len(self), self.indexed.prefix)
        row = int(self.order.shuffle_idx[index])
        first, last = int(self.order.sample_idx[row, 0]), int(self.order.sample_idx[row + 1, 0])
        pieces, missing = [], self.seq_length + 1
        for place in range(first, min(last + 1, len(self.order.doc_idx))):
            document = int(self.order.doc_idx[place])
            take = min(int(self.indexed.sizes[document]) if place < last else 1, missing)
            pieces.append((document, 0, take))
            missing -= take
        return self._read(pieces)


class BlendedDataset(TokenDataset):
    """Several datasets interleaved by weight, in NeoX's order.

    Args:
        datasets: all of one seq_length.
        weights: one per dataset; need not add up to 1.
        size: samples in the blend.
        repeat: a dataset that is too short starts over as in NeoX, at sample 1 after the first pass, at 0 after the later ones.

    Raises:
        DataError: lengths or weights do not fit, or, without `repeat`, the blend would need more samples than a dataset holds.
    """

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float], size: int, repeat: bool = False) -> None:
        if len(datasets) != len(weights) or not datasets:
            raise DataError(f"{len(weights)} weights for {len(datasets)} datasets", why="each dataset needs one weight")
        if len({dataset.seq_length for dataset in datasets}) != 1:
            raise DataError("datasets of different seq_length cannot be blended")
        self.datasets, self.seq_length = list(datasets), datasets[0].seq_length
        self.dataset_index, self.dataset_sample_index = blend(weights, size)
        self.needed = np.bincount(self.dataset_index, minlength=len(datasets)).tolist()
        for number, (count, dataset) in enumerate(zip(self.needed, datasets, strict=True)):
            if count > len(dataset) and (not repeat or len(dataset) < 2):
                raise DataError(
                    f"the blend needs {count} samples of dataset {number}, which holds {len(dataset)}",
                    why="a sample would be repeated without notice",
                    hint="build each dataset with the counts of samples_per_dataset",
                )

    def __len__(self) -> int:
        return len(self.dataset_index)

    def sample(self, index: int) -> Sample:
        """Sample `index`; a DataError beyond the end."""
        _check_range(index, len(self), "blended data")
        dataset, inside = self.datasets[int(self.dataset_index[index])], int(self.dataset_sample_index[index])
        # NeoX wraps an index beyond the end by its own idea of the length, which is one too small.
        return dataset.sample(inside if inside < len(dataset) else inside % (len(dataset) - 1))


class ChainedDataset(TokenDataset):
    """Datasets one after the other: all samples of the first, then those of the next."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        if not datasets or len({dataset.seq_length for dataset in datasets}) != 1:
            raise DataError("datasets of one seq_length are needed for a chain")
        self.datasets, self.seq_length = list(datasets), datasets[0].seq_length
        self._ends = np.cumsum([len(dataset) for dataset in datasets]).tolist()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def sample(self, index: int) -> Sample:
        """Sample `index`; a DataError beyond the end."""
        _check_range(index, len(self), "chained data")
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.datasets[part].sample(index - (self._ends[part - 1] if part else 0))


class RepeatedDataset(TokenDataset):
    """The same samples in the same order, `epochs` times over (NeoX's `train_epochs`)."""

    def __init__(self, dataset: Dataset, epochs: int) -> None:
        if epochs < 1 or len(dataset) < 1:
            raise DataError(f"{len(dataset)} samples cannot be repeated {epochs} times")
        self.dataset, self.epochs, self.seq_length = dataset, epochs, dataset.seq_length

    def __len__(self) -> int:
        return len(self.dataset) * self.epochs

    def sample(self, index: int) -> Sample:
        """Sample `index`; a DataError beyond the end."""
        _check_range(index, len(self), "repeated data")
        return self.dataset.sample(index % len(self.dataset))
