"""Map-style datasets of token ids: sample i of one corpus, or of several blended, chained or repeated."""

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
    """One training sequence.

    Attributes:
        tokens: i64 [seq_length + 1].
        targets: i64 [seq_length + 1], the label of each token as a prediction target, negative where the loss is masked;
            None: the tokens themselves.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64] | None = None


class Dataset(Protocol):
    """Samples numbered from 0; each has seq_length + 1 tokens: inputs and, shifted by one, labels."""

    @property
    def seq_length(self) -> int:
        """Tokens a sample predicts."""
        ...

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample:
        """Sample `index`; raises a DataError beyond the end."""
        ...


class TokenDataset:
    """Base class: `dataset[i]` returns the tokens (i64 [seq_length + 1]) of `dataset.sample(i)`."""

    seq_length: int

    def __len__(self) -> int:
        raise NotImplementedError

    def sample(self, index: int) -> Sample:
        """Sample `index`; raises a DataError beyond the end."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        return self.sample(index).tokens


def _check_range(index: int, length: int, where: str) -> None:
    if not 0 <= index < length:
        raise DataError(
            f"sample {index} does not exist",
            where=where,
            why=f"the order was built for {length} samples",
            hint="the run needs more data than train_iters, eval_iters or the weights account for",
        )


class _OrderedDataset(TokenDataset):
    """A corpus and a sample order, with or without labels."""

    def __init__(
        self, indexed: IndexedDataset, order: SampleIndex, vocab_size: int | None = None, labels: Labels | None = None
    ) -> None:
        indexed.require_integers()
        self.indexed, self.order, self.vocab_size, self.labels = indexed, order, vocab_size, labels
        self.seq_length = order.seq_length

    def __len__(self) -> int:
        return len(self.order)

    def _checked(self, document: int, offset: int, length: int) -> NDArray[np.int64]:
        """A slice of a document; raises a DataError that names a token outside the vocabulary."""
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

    def _read(self, slices: Sequence[tuple[int, int, int]]) -> Sample:
        """Concatenate slices (document, offset, length), truncated or padded (0, loss masked) to seq_length + 1."""
        width = self.seq_length + 1
        tokens = np.zeros(width, dtype=np.int64)
        targets = np.full(width, IGNORED, dtype=np.int64)
        at = 0
        for slice_ in slices:
            ids = self._checked(*slice_)
            tokens[at : at + len(ids)] = ids
            targets[at : at + len(ids)] = ids if self.labels is None else self._targets(self.labels, *slice_)
            at += len(ids)
        return Sample(tokens, targets if at < width or self.labels is not None else None)


class PackedDataset(_OrderedDataset):
    """Windows of `seq_length + 1` tokens of the shuffled stream of documents.

    Args:
        indexed: the corpus.
        order: maps sample i to its window (`order.build_sample_index`).
        vocab_size: if given, every sample is checked for ids outside it.
        labels: tokens that count in the loss; None: all.

    Raises:
        DataError: the corpus is not integer; in `sample`: no such sample (nothing wraps around), or a token outside the
            vocabulary.
    """

    def sample(self, index: int) -> Sample:
        """Sample `index`."""
        _check_range(index, len(self), self.indexed.prefix)
        row = int(self.order.shuffle_idx[index])
        position, offset = (int(value) for value in self.order.sample_idx[row])
        slices, missing = [], self.seq_length + 1
        while missing > 0:
            document = int(self.order.doc_idx[position])
            take = min(int(self.indexed.sizes[document]) - offset, missing)
            slices.append((document, offset, take))
            missing -= take
            position, offset = position + 1, 0
        return self._read(slices)


class PaddedDataset(_OrderedDataset):
    """Whole documents, padded with 0 to `seq_length + 1` tokens (`packing.build_padded_index`).

    As in NeoX, the first token of the next document precedes the padding. The loss on padding is masked (NeoX counts
    it without label files), and the last row of the order is a valid sample (NeoX fails there and silently returns
    another sample, or recurses endlessly). Arguments as for `PackedDataset`.
    """

    def sample(self, index: int) -> Sample:
        """Sample `index`."""
        _check_range(index, len(self), self.indexed.prefix)
        row = int(self.order.shuffle_idx[index])
        first, last = int(self.order.sample_idx[row, 0]), int(self.order.sample_idx[row + 1, 0])
        slices, missing = [], self.seq_length + 1
        for position in range(first, min(last + 1, len(self.order.doc_idx))):
            document = int(self.order.doc_idx[position])
            take = min(int(self.indexed.sizes[document]) if position < last else 1, missing)
            slices.append((document, 0, take))
            missing -= take
        return self._read(slices)


class BlendedDataset(TokenDataset):
    """Several datasets interleaved by weight, in NeoX's order.

    Args:
        datasets: all of one seq_length.
        weights: one per dataset; any positive sum.
        size: samples in the blend.
        repeat: a dataset that is too short starts over as in NeoX, at sample 1 after the first epoch, at 0 after later ones.

    Raises:
        DataError: lengths or weights do not match, or, without `repeat`, the blend needs more samples than a dataset holds.
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
        """Sample `index`; raises a DataError beyond the end."""
        _check_range(index, len(self), "blended data")
        dataset, inside = self.datasets[int(self.dataset_index[index])], int(self.dataset_sample_index[index])
        # NeoX wraps an index beyond the end by its own length, which is one too small.
        return dataset.sample(inside if inside < len(dataset) else inside % (len(dataset) - 1))


class ChainedDataset(TokenDataset):
    """Concatenated datasets: all samples of the first, then those of the next."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        if not datasets or len({dataset.seq_length for dataset in datasets}) != 1:
            raise DataError("datasets of one seq_length are needed for a chain")
        self.datasets, self.seq_length = list(datasets), datasets[0].seq_length
        self._ends = np.cumsum([len(dataset) for dataset in datasets]).tolist()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def sample(self, index: int) -> Sample:
        """Sample `index`; raises a DataError beyond the end."""
        _check_range(index, len(self), "chained data")
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.datasets[number].sample(index - (self._ends[number - 1] if number else 0))


class RepeatedDataset(TokenDataset):
    """The same samples in the same order, `epochs` times (NeoX's `train_epochs`)."""

    def __init__(self, dataset: Dataset, epochs: int) -> None:
        if epochs < 1 or len(dataset) < 1:
            raise DataError(f"{len(dataset)} samples cannot be repeated {epochs} times")
        self.dataset, self.epochs, self.seq_length = dataset, epochs, dataset.seq_length

    def __len__(self) -> int:
        return len(self.dataset) * self.epochs

    def sample(self, index: int) -> Sample:
        """Sample `index`; raises a DataError beyond the end."""
        _check_range(index, len(self), "repeated data")
        return self.dataset.sample(index % len(self.dataset))
