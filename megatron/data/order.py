"""In which order a run sees its corpus: pure functions from sizes and a seed to the arrays NeoX would have made.

The arrays are equal to NeoX's for the same numbers (golden files prove it), so that an old run can be repeated and its cached
`.npy` files mean the same here. All is vectorised: boundaries of samples are looked up in the running sum of document sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.shares import split_shares
from megatron.errors import DataError

SPLIT_NAMES = ("train", "valid", "test")
CHUNK = 1 << 22  # documents handled in one piece, to bound temporary memory

Documents = NDArray[Any] | range  # ids of documents; a range costs no memory, which counts at 300 million of them


def split_borders(split: str, size: int) -> list[int]:
    """Document boundaries `[0, train end, valid end, test end]` of a split such as `969, 30, 1`, rounded as NeoX rounds.

    Args:
        split: up to three shares, separated by commas or, if there is no comma, by slashes.
        size: number of documents.

    Raises:
        DataError: a share is not a number, is negative, or all are zero.
    """
    shares = split_shares(split)
    total = sum(shares)
    boundaries = [0]
    for share in shares:
        boundaries.append(boundaries[-1] + round(share / total * size))
    # NeoX moves all three boundaries by the rounding difference, not only the last one.
    surplus = boundaries[-1] - size
    return [0, *(boundary - surplus for boundary in boundaries[1:])]


def split_documents(split: str, size: int) -> dict[str, range]:
    """The documents of `train`, `valid` and `test`: contiguous ranges, empty where the split leaves nothing."""
    boundaries = split_borders(split, size)
    return {name: range(boundaries[i], boundaries[i + 1]) for i, name in enumerate(SPLIT_NAMES)}


def sample_counts(train_iters: int, eval_interval: int, eval_iters: int, global_batch: int) -> dict[str, int]:
    """Samples a run needs per split, as NeoX counts them (one evaluation per interval and one at the end)."""
    evaluations = train_iters // eval_interval + 1 if eval_interval else 1
    return {
        "train": train_iters * global_batch,
        "valid": evaluations * eval_iters * global_batch,
        "test": eval_iters * global_batch,
    }


@dataclass(frozen=True)
class SampleIndex:
    """What sample i is: row `shuffle_idx[i]` of `sample_idx`, up to the start of the next row and one token more.

    Attributes:
        doc_idx: i32 [epochs * documents], the documents in the order they are read (i64 where `packing.py` made it).
        sample_idx: i32 or i64 [n + 1, 2], (place in doc_idx, token inside that document) where each sample starts.
        shuffle_idx: u32 or i64 [n], the order in which samples are served.
        seq_length: tokens a sample predicts; it holds one more.
    """

    doc_idx: NDArray[Any]
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
    documents: Documents,
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
    stream = _stream(documents, sizes, epochs)
    rng.shuffle(stream)
    sample_idx = _sample_borders(stream, seq_length, samples)
    doc_idx = _narrowed(stream, np.dtype(np.int32))
    shuffle_idx = np.arange(samples, dtype=np.int64)
    rng.shuffle(shuffle_idx)
    if samples < np.iinfo(np.uint32).max - 1:
        shuffle_idx = _narrowed(shuffle_idx, np.dtype(np.uint32))
    return SampleIndex(doc_idx, sample_idx, shuffle_idx, seq_length)


def sizes_of(documents: Documents, sizes: NDArray[Any], at: int, length: int | None = None) -> NDArray[Any]:
    """Sizes of `documents[at : at + length]` (None: `CHUNK`); a view where the documents are a range."""
    part = documents[at : at + (CHUNK if length is None else length)]
    return sizes[part.start : part.stop] if isinstance(part, range) else sizes[part]


def count_tokens(documents: Documents, sizes: NDArray[Any]) -> int:
    """Tokens in `documents`, summed in pieces."""
    return sum(int(sizes_of(documents, sizes, at).sum(dtype=np.int64)) for at in range(0, len(documents), CHUNK))


def _stream(documents: Documents, sizes: NDArray[Any], epochs: int) -> NDArray[np.int64]:
    """Per place one number, `size << 32 | document`: the shuffle then carries the sizes along.

    Looking sizes up after the shuffle is as slow as the shuffle itself (both jump through memory), and 8-byte items are the
    case numpy shuffles fastest; the permutation does not depend on the items.
    """
    count = len(documents)
    stream = np.empty(epochs * count, dtype=np.int64)
    for at in range(0, count, CHUNK):
        piece = stream[at : min(at + CHUNK, count)]
        piece[:] = sizes_of(documents, sizes, at)
        piece <<= 32
        part = documents[at : at + CHUNK]
        piece |= np.arange(part.start, part.stop) if isinstance(part, range) else part
    for epoch in range(1, epochs):
        stream[epoch * count : (epoch + 1) * count] = stream[:count]
    return stream


def _narrowed(values: NDArray[np.int64], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The low halves of `values` as a 4-byte type, in the memory of `values`, whose other half is given back."""
    count = len(values)
    narrow = values.view(dtype)
    for at in range(0, count, CHUNK):
        low = values[at : at + CHUNK] & 0xFFFFFFFF
        narrow[at : at + len(low)] = low
    del narrow  # no view may be left when the memory moves
    values.resize((count + 1) // 2, refcheck=False)
    return values.view(dtype)[:count]


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


def _sample_borders(stream: NDArray[np.int64], seq_length: int, samples: int) -> NDArray[Any]:
    """Where sample j starts: token `j * seq_length` of the stream, as (place in the stream, token in that document).

    The stream passes by in pieces, each with the samples that start in it: the running sum is never held as a whole.
    """
    limit = np.iinfo(np.int32).max
    narrow = 2 * (samples + 1) < limit and len(stream) <= limit
    boundaries = np.empty((samples + 1, 2), dtype=np.int32 if narrow else np.int64)
    before = done = 0
    for at in range(0, len(stream), CHUNK):
        ends = np.cumsum(stream[at : at + CHUNK] >> 32)
        after = before + int(ends[-1])
        until = min(samples + 1, -(-after // seq_length))
        starts = np.arange(done, until, dtype=np.int64) * seq_length - before
        # The first document that ends behind the token; documents without tokens are passed over.
        places = np.searchsorted(ends, starts, side="right")
        starts -= np.where(places > 0, ends[places - 1], 0)
        places += at
        boundaries[done:until, 0], boundaries[done:until, 1] = places, starts
        before, done = after, until
    boundaries[0] = 0  # NeoX starts at the first document even if it is empty
    return boundaries
