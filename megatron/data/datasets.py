"""Sample i of a corpus, or of a blend of corpora, as token ids: the face every source of training data shows to the batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.data.blend import blend
from megatron.data.indexed import IndexedDataset
from megatron.data.order import SampleIndex
from megatron.errors import DataError


class Dataset(Protocol):
    """Samples numbered from 0; each is i64 [seq_length + 1], the tokens to read and, shifted by one, to predict."""

    @property
    def seq_length(self) -> int:
        """Tokens a sample predicts."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> NDArray[np.int64]: ...


def _check_range(index: int, length: int, where: str) -> None:
    if not 0 <= index < length:
        raise DataError(
            f"sample {index} does not exist",
            where=where,
            why=f"the order was built for {length} samples",
            hint="the run asks for more data than train_iters, eval_iters or the weights promised",
        )


class PackedDataset:
    """Windows of `seq_length + 1` tokens cut from the shuffled stream of documents.

    Args:
        indexed: the corpus.
        order: which window is sample i.
        vocab_size: if given, every sample is checked to hold only ids below it.

    Raises:
        DataError: the corpus holds no integers.
    """

    def __init__(self, indexed: IndexedDataset, order: SampleIndex, vocab_size: int | None = None) -> None:
        indexed.require_integers()
        self.indexed, self.order, self.vocab_size = indexed, order, vocab_size
        self.seq_length = order.seq_length

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Sample `index`, i64 [seq_length + 1].

        Raises:
            DataError: no such sample (nothing wraps around), or a token beyond the vocabulary.
        """
        _check_range(index, len(self), self.indexed.prefix)
        row = int(self.order.shuffle_idx[index])
        place, offset = (int(value) for value in self.order.sample_idx[row])
        out = np.empty(self.seq_length + 1, dtype=np.int64)
        filled = 0
        while filled < len(out):
            document = int(self.order.doc_idx[place])
            take = min(int(self.indexed.sizes[document]) - offset, len(out) - filled)
            tokens = self.indexed.get(document, offset, take)
            out[filled : filled + take] = tokens
            if self.vocab_size is not None and take:
                self._check_tokens(out[filled : filled + take], document, offset, self.vocab_size)
            filled += take
            place, offset = place + 1, 0
        return out

    def _check_tokens(self, tokens: NDArray[np.int64], document: int, offset: int, vocab_size: int) -> None:
        if int(tokens.max()) < vocab_size and int(tokens.min()) >= 0:
            return
        wrong = int(np.argmax((tokens >= vocab_size) | (tokens < 0)))
        first = int(self.indexed.offsets[document]) // self.indexed.dtype.itemsize
        raise self.indexed.wrong_token(first + offset + wrong, int(tokens[wrong]), vocab_size)


class BlendedDataset:
    """Several datasets interleaved by weight, in NeoX's order.

    Args:
        datasets: all of one seq_length.
        weights: one per dataset; need not add up to 1.
        size: samples in the blend.

    Raises:
        DataError: lengths or weights do not fit, or the blend would need more samples of a dataset than it holds.
    """

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float], size: int) -> None:
        if len(datasets) != len(weights) or not datasets:
            raise DataError(f"{len(weights)} weights for {len(datasets)} datasets", why="each dataset needs one weight")
        if len({dataset.seq_length for dataset in datasets}) != 1:
            raise DataError("datasets of different seq_length cannot be blended")
        self.datasets, self.seq_length = list(datasets), datasets[0].seq_length
        self.dataset_index, self.dataset_sample_index = blend(weights, size)
        needed = np.bincount(self.dataset_index, minlength=len(datasets))
        for number, (count, dataset) in enumerate(zip(needed, datasets, strict=True)):
            if count > len(dataset):
                raise DataError(
                    f"the blend needs {count} samples of dataset {number}, which holds {len(dataset)}",
                    why="a sample would be repeated without notice",
                    hint="build each dataset with the counts of samples_per_dataset",
                )

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Sample `index`, i64 [seq_length + 1]; a DataError beyond the end."""
        _check_range(index, len(self), "blended data")
        return self.datasets[int(self.dataset_index[index])][int(self.dataset_sample_index[index])]
