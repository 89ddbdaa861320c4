"""Which of several corpora each sample comes from: NeoX's greedy blend, exact bitwise and fast.

At step i the corpus is chosen whose share `w * max(i, 1)` exceeds what it has given so far the most; ties go to the first.
That is a chain of n dependent choices, too slow in Python for millions. But a chain forgets: started with slightly wrong
counts it soon makes the same choices as the true one. So the steps are cut into lanes that run side by side from estimated
counts; a lane whose start differs from the end of the lane before it is run again from there, until all agree. Lane 0 starts
exactly, hence agreement proves the whole chain equal to the sequential one, whatever the estimates were worth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron.errors import DataError

_MARGIN = 1.005  # NeoX draws half a percent more of each corpus than its share
_MAX_LANES = 8192
_MIN_STEPS = 64
_PIECE = 1 << 22


def normalise(weights: Sequence[float]) -> NDArray[np.float64]:
    """Weights that add up to 1.

    Raises:
        DataError: empty, negative, not finite, or all zero.
    """
    values = np.asarray(weights, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
        raise DataError(
            f"data weights {list(weights)} cannot be used",
            why="they need one number per corpus, none negative, not all zero",
        )
    return np.asarray(values / values.sum(), dtype=np.float64)


def samples_per_dataset(weights: Sequence[float], num_samples: int) -> list[int]:
    """Samples each corpus must hold so that a blend of `num_samples` never runs out: `ceil(n * w * 1.005)`."""
    return [math.ceil(num_samples * float(weight) * _MARGIN) for weight in normalise(weights)]


def weights_by_documents(documents: Sequence[int], alpha: float = 0.3) -> list[float]:
    """NeoX's `weight_by_num_documents`: `p_i ~ (n_i / n) ** alpha`, then `w_i ~ p_i * (1 - n_i / n)`, adding up to 1.

    Raises:
        DataError: there are no documents, or alpha is negative and a corpus has none.
    """
    counts = np.asarray(documents, dtype=np.float64)
    with np.errstate(all="ignore"):
        share = counts / counts.sum()
        scaled = share**alpha
        unbiased = scaled / scaled.sum() * (1 - share)
        weights = [1.0] if len(counts) == 1 else (unbiased / unbiased.sum()).tolist()
    if len(counts) == 0 or (counts < 0).any() or counts.sum() == 0 or not all(map(math.isfinite, weights)):
        raise DataError(f"corpora of {list(documents)} documents cannot be weighted by documents (alpha {alpha})")
    return weights


def blend(weights: Sequence[float], size: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """NeoX's `dataset_index` (u8 [size]) and `dataset_sample_index` (i64 [size]).

    Args:
        weights: one per corpus, at most 255; need not add up to 1.
        size: samples in the blend. A shorter blend is the beginning of a longer one.

    Raises:
        DataError: see `normalise`, or more than 255 corpora.
    """
    shares = normalise(weights)
    if len(shares) > 255:
        raise DataError(f"{len(shares)} corpora cannot be blended", why="the index has one byte per sample: at most 255")
    chosen = _choose(shares, size)
    return chosen, _count_within(chosen)


def _choose(shares: NDArray[np.float64], size: int) -> NDArray[np.uint8]:
    """The chain of choices, computed in lanes of equal length until each lane starts where the one before it ends."""
    lanes = max(1, min(_MAX_LANES, size // _MIN_STEPS))
    steps = -(-size // lanes)
    firsts = np.arange(lanes, dtype=np.int64) * steps
    starts = _estimated_counts(shares, firsts)
    ends = np.empty_like(starts)
    choices = np.empty((lanes, steps), dtype=np.uint8)
    stale = np.arange(lanes)
    while len(stale):
        choices[stale], ends[:, stale] = _run_lanes(shares, starts[:, stale], firsts[stale], steps)
        stale = 1 + np.flatnonzero((starts[:, 1:] != ends[:, :-1]).any(axis=0))
        starts[:, stale] = ends[:, stale - 1]
    return choices.reshape(-1)[:size]


def _estimated_counts(shares: NDArray[np.float64], steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """Counts [d, lanes] after `steps` choices by largest remainder: what the greedy rule keeps close to."""
    targets = shares[:, None] * steps
    counts = np.floor(targets)
    missing = np.rint(steps - counts.sum(axis=0))
    rank = np.argsort(np.argsort(counts - targets, axis=0, kind="stable"), axis=0)
    return np.asarray(counts + (rank < missing), dtype=np.float64)


def _run_lanes(
    shares: NDArray[np.float64], starts: NDArray[np.float64], firsts: NDArray[np.int64], steps: int
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Choices [lanes, steps] and final counts [d, lanes] of the greedy rule; the arithmetic is NeoX's, in doubles."""
    lanes = len(firsts)
    counts, lane = starts.copy(), np.arange(lanes)
    flat = counts.reshape(-1)
    choices = np.empty((steps, lanes), dtype=np.uint8)
    best, error, larger = np.empty(lanes), np.empty(lanes), np.empty(lanes, dtype=bool)
    for step in range(steps):
        at = np.maximum(firsts + step, 1).astype(np.float64)
        choice = choices[step]
        choice[:] = 0
        np.multiply(shares[0], at, out=best)
        best -= counts[0]
        for d in range(1, len(shares)):
            np.multiply(shares[d], at, out=error)
            error -= counts[d]
            np.greater(error, best, out=larger)
            np.copyto(choice, d, where=larger)
            np.copyto(best, error, where=larger)
        flat[choice.astype(np.int64) * lanes + lane] += 1.0
    return choices.T, counts


def _count_within(chosen: NDArray[np.uint8]) -> NDArray[np.int64]:
    """For each sample, how many samples of the same corpus came before it; in pieces, to bound temporary memory."""
    within = np.empty(len(chosen), dtype=np.int64)
    before = np.zeros(256, dtype=np.int64)
    for at in range(0, len(chosen), _PIECE):
        piece = chosen[at : at + _PIECE]
        order = np.argsort(piece, kind="stable")
        counts = np.bincount(piece, minlength=256)
        firsts = np.cumsum(counts) - counts
        within[at + order] = np.arange(len(piece)) + np.repeat(before - firsts, counts)
        before += counts
    return within
