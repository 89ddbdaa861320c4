"""Sample orders without document splitting: whole documents until the sequence is full, or one document each; the rest is padding.

As in NeoX, documents come in shuffled (`pack_until_overflow`) or original order (`unpacked`) and start over at the end, a
document whose labels are all ignored is skipped, and one that is longer than a sample is truncated, or skipped without
`allow_chopped`. The arrays equal NeoX's for the same documents. NeoX itself passes the wrong documents for valid and test
(the first of the corpus, which are training data); here each split draws from its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.order import Documents, SampleIndex, sizes_of
from megatron.errors import DataError

PACKED, UNTIL_OVERFLOW, UNPACKED = "packed", "pack_until_overflow", "unpacked"
PACK_IMPLS = (PACKED, UNTIL_OVERFLOW, UNPACKED)


def check_pack_impl(pack_impl: str) -> None:
    """Raise a DataError unless `pack_impl` is one of `PACK_IMPLS`."""
    if pack_impl not in PACK_IMPLS:
        raise DataError(f"pack_impl: {pack_impl} is unknown", hint=f"one of {', '.join(PACK_IMPLS)}")


def build_padded_index(
    pack_impl: str,
    documents: Documents,
    sizes: NDArray[Any],
    seq_length: int,
    num_samples: int,
    seed: int,
    allow_chopped: bool = True,
    ignored: NDArray[np.bool_] | None = None,
) -> SampleIndex:
    """NeoX's doc_idx (i64), sample_idx (i64 [n + 1, 2], second column 0) and shuffle_idx (i64 [n]) for whole documents.

    Args:
        pack_impl: `pack_until_overflow` or `unpacked`.
        documents: ids of the documents to draw from, [d].
        sizes: tokens of every document of the corpus, [N].
        seq_length: tokens a sample predicts.
        num_samples: samples to build.
        seed: seed of both shuffles, 0 .. 2^32 - 1.
        allow_chopped: truncate documents of more than `seq_length + 1` tokens instead of skipping them.
        ignored: [d] bool, True for a document none of whose labels counts, see `Labels.ignored`.

    Raises:
        DataError: no document is usable, or a number is out of range.
    """
    if seq_length < 1 or num_samples < 1 or not 0 <= seed < 2**32:
        raise DataError(f"no order of {num_samples} samples of {seq_length} tokens for seed {seed}", why="out of range")
    own_sizes = sizes_of(documents, sizes, 0, len(documents)).astype(np.int64)
    usable = own_sizes > 0
    if not allow_chopped:
        usable &= own_sizes <= seq_length + 1
    if ignored is not None:
        usable &= ~ignored
    if not usable.any():
        raise DataError(
            f"none of {len(documents)} documents can be a sample",
            why="each is empty, has only ignored labels, or is longer than a sample "
            f"of {seq_length} + 1 tokens (allow_chopped: {allow_chopped})",
            hint="set allow_chopped: true, or a longer seq_length",
        )
    rng = np.random.RandomState(seed)
    shuffle_idx = np.arange(num_samples, dtype=np.int64)
    rng.shuffle(shuffle_idx)
    if pack_impl == UNPACKED:
        picks = np.resize(np.flatnonzero(usable), num_samples + 1)
        starts = np.arange(num_samples + 1, dtype=np.int64)
    else:
        picks, starts = _until_overflow(rng, own_sizes, usable, seq_length + 1, num_samples)
    doc_idx = np.asarray(documents, dtype=np.int64)[picks]
    return SampleIndex(doc_idx, np.stack([starts, np.zeros_like(starts)], axis=1), shuffle_idx, seq_length)


def _until_overflow(
    rng: np.random.RandomState, sizes: NDArray[np.int64], usable: NDArray[np.bool_], capacity: int, samples: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Documents in the order of their use and, in that list, the start of each sample and the end of the last.

    A sample that is incomplete at the end of an epoch continues in the next one. NeoX ends with the first document
    of the last sample, so the last sample is short.
    """
    order = np.arange(len(sizes), dtype=np.int64)
    used: list[NDArray[np.int64]] = []
    starts: list[NDArray[np.int64]] = []
    count = passed = filled = 0
    while count < samples:
        rng.shuffle(order)
        stream = order[usable[order]]
        ends = np.cumsum(sizes[stream])
        first = int(np.searchsorted(ends, capacity - filled, side="right")) if filled else 0
        new_starts = _starts(ends, first, capacity)[: samples - count]
        used.append(stream)
        starts.append(new_starts + passed)
        count += len(new_starts)
        passed += len(stream)
        filled = filled + int(ends[-1]) if len(new_starts) == 0 else int(ends[-1] - (ends[new_starts[-1] - 1] if new_starts[-1] else 0))
    all_starts = np.concatenate(starts)
    last = int(all_starts[-1]) + 1
    return np.concatenate(used)[:last], np.append(all_starts, last)


def _starts(ends: NDArray[np.int64], first: int, capacity: int) -> NDArray[np.int64]:
    """First documents of one epoch's samples, from `first` on; each takes what fits into `capacity`, at least one document."""
    before = np.concatenate([[0], ends[:-1]])
    following = np.maximum(np.searchsorted(ends, before + capacity, side="right"), np.arange(1, len(ends) + 1))
    starts = []
    at, steps = first, following.tolist()  # the end of a sample depends on its start: this step cannot be vectorised
    while at < len(ends):
        starts.append(at)
        at = steps[at]
    return np.array(starts, dtype=np.int64)
