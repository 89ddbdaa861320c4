"""In which order a run sees its corpus: pure functions from sizes and a seed to the arrays NeoX would have made.

The arrays are equal to NeoX's for the same numbers (golden files prove it), so that an old run can be repeated and its cached
`.npy` files mean the same here. All is vectorised: borders of samples are looked up in the running sum of document sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.errors import DataError

SPLIT_NAMES = ("train", "valid", "test")
_CHUNK = 1 << 22  # documents or samples handled in one piece, to bound temporary memory


def split_borders(split: str, size: int) -> list[int]:
    """Document borders `[0, train end, valid end, test end]` of a split such as `969, 30, 1`, rounded as NeoX rounds.

    Args:
        split: up to three shares, separated by commas or, if there is no comma, by slashes.
        size: number of documents.

    Raises:
        DataError: a share is not a number, is negative, or all are zero.
    """
    parts = split.split("," if "," in split else "/")
    try:
        shares = [float(part) for part in parts]
    except ValueError:
        shares = [math.nan]
    if not all(math.isfinite(share) and share >= 0 for share in shares) or not any(shares[:3]):
        raise DataError(
            f"split {split!r} cannot be read",
            why="it needs one to three numbers, none negative, not all zero",
            hint='for example split: "969, 30, 1"',
        )
    first, second, third = (*shares, 0.0, 0.0)[:3]
    total = first + second + third
    borders = [0]
    for share in (first, second, third):
        borders.append(borders[-1] + round(share / total * size))
    # NeoX moves all three borders by the rounding difference, not only the last one.
    surplus = borders[-1] - size
    return [0, *(border - surplus for border in borders[1:])]


def split_documents(split: str, size: int) -> dict[str, NDArray[np.int32]]:
    """The documents of `train`, `valid` and `test` (each i32, ascending; empty where the split leaves nothing)."""
    borders = split_borders(split, size)
    return {name: np.arange(borders[i], borders[i + 1], dtype=np.int32) for i, name in enumerate(SPLIT_NAMES)}


def sample_counts(train_iters: int, eval_interval: int, eval_iters: int, global_batch: int) -> dict[str, int]:
    """Samples a run needs per split, as NeoX counts them (one evaluation per interval and one at the end)."""
    evaluations = train_iters // eval_interval + 1 if eval_interval else 1
    return {
        "train": train_iters * global_batch,
        "valid": evaluations * eval_iters * global_batch,
        "test": eval_iters * global_batch,
    }


def require_packed(pack_impl: str) -> None:
    """Raise a DataError unless `pack_impl` is `packed`."""
    if pack_impl != "packed":
        raise DataError(
            f"pack_impl: {pack_impl} is not supported",
            why="samples are built by cutting the stream of documents into windows (packed) only",
            hint="set pack_impl: packed",
        )


@dataclass(frozen=True)
class SampleIndex:
    """What sample i is: row `shuffle_idx[i]` of `sample_idx`, up to the start of the next row and one token more.

    Attributes:
        doc_idx: i32 [epochs * documents], the documents in the order they are read.
        sample_idx: i32 or i64 [n + 1, 2], (place in doc_idx, token inside that document) where each sample starts.
        shuffle_idx: u32 or i64 [n], the order in which samples are served.
        seq_length: tokens a sample predicts; it holds one more.
    """

    doc_idx: NDArray[np.int32]
    sample_idx: NDArray[Any]
    shuffle_idx: NDArray[Any]
    seq_length: int

    def __len__(self) -> int:
        """Samples that can be served. NeoX's own `len` is one less, see `neox_length`."""
        return len(self.shuffle_idx)

    @property
    def neox_length(self) -> int:
        """The length NeoX reports, one too small by an old slip; its blends are sized by it."""
        return len(self) - 1


def epochs_for(tokens: int, seq_length: int, num_samples: int) -> int:
    """The smallest number of passes (at least 1) over `tokens` that gives `num_samples` windows overlapping by one token."""
    return max(1, -(-(num_samples * seq_length + 1) // tokens))


def build_sample_index(
    documents: NDArray[Any],
    sizes: NDArray[Any],
    seq_length: int,
    num_samples: int | None,
    seed: int,
    epochs: int | None = None,
) -> SampleIndex:
    """NeoX's doc_idx, sample_idx and shuffle_idx for packed samples.

    Args:
        documents: ids of the documents to draw from, [d].
        sizes: tokens of every document of the corpus, [N].
        seq_length: tokens a sample predicts.
        num_samples: samples wanted at least; ignored where `epochs` is given.
        seed: 0 .. 2^32 - 1.
        epochs: passes over the documents (NeoX's `train_epochs` route uses 1).

    Raises:
        DataError: no tokens, too few tokens for one sample, or a seed out of range.
    """
    tokens = count_tokens(documents, sizes)
    _check_request(tokens, seq_length, num_samples, seed, epochs)
    if epochs is None:
        epochs = epochs_for(tokens, seq_length, num_samples or 0)
    samples = (epochs * tokens - 1) // seq_length
    if samples == 0 and num_samples != 0:
        raise DataError(
            f"{tokens} tokens are too few for one sample of {seq_length} + 1 tokens",
            why=f"the split holds {len(documents)} documents",
            hint="give this split a larger share, or use a shorter seq_length",
        )
    # One generator for both shuffles, in this order: the state after the first is the seed of the second.
    rng = np.random.RandomState(seed)
    doc_idx = np.tile(np.asarray(documents, dtype=np.int32), epochs)
    rng.shuffle(doc_idx)
    sample_idx = _sample_borders(doc_idx, sizes, seq_length, samples)
    narrow = samples < np.iinfo(np.uint32).max - 1
    shuffle_idx = np.arange(samples, dtype=np.uint32 if narrow else np.int64)
    rng.shuffle(shuffle_idx)
    return SampleIndex(doc_idx, sample_idx, shuffle_idx, seq_length)


def count_tokens(documents: NDArray[Any], sizes: NDArray[Any]) -> int:
    """Tokens in `documents`, summed in pieces."""
    return sum(int(sizes[documents[at : at + _CHUNK]].sum(dtype=np.int64)) for at in range(0, len(documents), _CHUNK))


def _check_request(tokens: int, seq_length: int, num_samples: int | None, seed: int, epochs: int | None) -> None:
    if tokens == 0:
        raise DataError("there are no tokens to sample from", why="the split holds no document, or only empty ones")
    if seq_length < 1:
        raise DataError(f"seq_length {seq_length} is not possible", why="a sample predicts at least one token")
    if not 0 <= seed < 2**32:
        raise DataError(f"seed {seed} is not possible", why="the generator takes 0 .. 4294967295")
    if num_samples is None and epochs is None:
        raise DataError("neither a number of samples nor a number of epochs is given")
    if (num_samples is not None and num_samples < 0) or (epochs is not None and epochs < 1):
        raise DataError(f"cannot draw {num_samples} samples in {epochs} epochs", why="counts cannot be negative")


def _sample_borders(doc_idx: NDArray[np.int32], sizes: NDArray[Any], seq_length: int, samples: int) -> NDArray[Any]:
    """Where sample j starts: token `j * seq_length` of the stream, as (place in doc_idx, token in that document)."""
    ends = np.empty(len(doc_idx), dtype=np.int64)
    total = 0
    for at in range(0, len(doc_idx), _CHUNK):
        piece = ends[at : at + _CHUNK]
        np.cumsum(sizes[doc_idx[at : at + _CHUNK]], dtype=np.int64, out=piece)
        piece += total
        total = int(piece[-1])
    limit = np.iinfo(np.int32).max
    narrow = 2 * (samples + 1) < limit and len(doc_idx) <= limit
    borders = np.empty((samples + 1, 2), dtype=np.int32 if narrow else np.int64)
    for at in range(0, samples + 1, _CHUNK):
        starts = np.arange(at, min(at + _CHUNK, samples + 1), dtype=np.int64) * seq_length
        # The first document that ends behind the token; documents without tokens are passed over.
        places = np.searchsorted(ends, starts, side="right")
        before = np.where(places > 0, ends[places - 1], 0)
        borders[at : at + len(starts), 0] = places
        borders[at : at + len(starts), 1] = starts - before
    borders[0] = 0  # NeoX starts at the first document even if it is empty
    return borders
