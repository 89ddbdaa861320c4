"""Reads and proves the table of a token index, in NeoX's two formats, so that everything above sees one kind of corpus.

Nothing in a file is believed before it is proved: every number is compared with the other numbers and with the length of the
file, in Python integers that cannot overflow, and no array is larger than the file it came from.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.token_format import BLOCK, DTYPES, HEADER, LEGACY_HEADER, LEGACY_MAGIC, MAGIC, VERSION
from megatron.errors import DataError
from megatron.files import open_regular


@dataclass(frozen=True)
class IndexTable:
    """What an index says.

    Attributes:
        dtype: type of a token on disk.
        sizes: i32 [N], tokens per sequence.
        offsets: i64 [N], first byte of each sequence in `.bin`.
        doc_idx: i64 [D], sequences before each document boundary.
        total_tokens: the sum of the sizes.
        legacy: it is a TNTIDX file.
    """

    dtype: np.dtype[Any]
    sizes: NDArray[np.int32]
    offsets: NDArray[np.int64]
    doc_idx: NDArray[np.int64]
    total_tokens: int
    legacy: bool


def damaged(what: str, why: str, path: Path) -> DataError:
    """The error for a file that contradicts itself."""
    return DataError(what, where=str(path), why=why, hint="the file is damaged or only partly copied: copy or prepare it again")


def read_table(path: Path) -> IndexTable:
    """The proved table of an `.idx` file.

    Raises:
        DataError: it is cut, too long, of another format, empty, or its numbers contradict each other.
    """
    length = path.stat().st_size
    with os.fdopen(open_regular(path), "rb") as handle:
        head = handle.read(max(HEADER.size, LEGACY_HEADER.size))
    legacy = head.startswith(LEGACY_MAGIC)
    if not legacy and head[: len(MAGIC)] != MAGIC:
        raise damaged("not a token index", f"it starts with {head[: len(MAGIC)]!r}, not {MAGIC!r}", path)
    size = LEGACY_HEADER.size if legacy else HEADER.size
    if len(head) < size:
        raise damaged("the index is cut", f"{length} bytes, the header alone has {size}", path)
    dtype, sizes, offsets, doc_idx = _legacy(path, head, length) if legacy else _mapped(path, head, length)
    total = _prove_offsets(sizes, offsets, dtype.itemsize, path)
    _prove_documents(doc_idx, len(sizes), path)
    return IndexTable(dtype, sizes, offsets, doc_idx, total, legacy)


def _dtype(version: int, code: int, path: Path) -> np.dtype[Any]:
    if version != VERSION:
        raise damaged(f"index version {version} is not known", f"only version {VERSION} exists", path)
    if code not in DTYPES:
        raise damaged(f"dtype code {code} is not known", f"it must be one of {sorted(DTYPES)}", path)
    return DTYPES[code]


def _prove_length(length: int, expected: int, count: int, documents: int, path: Path) -> None:
    if length != expected:
        state = "cut" if length < expected else "too long"
        raise damaged(
            f"the index is {state}: {length} bytes instead of {expected}",
            f"the header promises {count} sequences and {documents} document boundaries",
            path,
        )
    if count == 0:
        raise DataError("the corpus is empty", where=str(path), why="the index lists no sequence")


def _mapped(path: Path, head: bytes, length: int) -> tuple[np.dtype[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    _, version, code, count, documents = HEADER.unpack(head[: HEADER.size])
    dtype = _dtype(version, code, path)
    _prove_length(length, HEADER.size + 12 * count + 8 * documents, count, documents, path)
    table, start = np.memmap(path, dtype=np.uint8, mode="r"), HEADER.size
    sizes = np.frombuffer(table, "<i4", count, start)
    offsets = np.frombuffer(table, "<i8", count, start + 4 * count)
    return dtype, sizes, offsets, np.frombuffer(table, "<i8", documents, start + 12 * count)


def _legacy(path: Path, head: bytes, length: int) -> tuple[np.dtype[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """TNTIDX counts offsets in tokens and allows sequences of several dimensions, which no text has."""
    _, version, code, itemsize, count, entries, documents = LEGACY_HEADER.unpack(head[: LEGACY_HEADER.size])
    dtype = _dtype(version, code, path)
    if itemsize != dtype.itemsize:
        raise damaged(f"a token has {itemsize} bytes", f"dtype code {code} ({dtype.name}) has {dtype.itemsize}", path)
    start = LEGACY_HEADER.size
    _prove_length(length, start + 8 * (2 * (count + 1) + entries + documents), count, documents, path)
    if entries != count:
        raise damaged(f"{count} sequences have {entries} sizes", "a sequence of tokens has one size", path)
    table = np.memmap(path, dtype=np.uint8, mode="r")
    dimensions = np.frombuffer(table, "<i8", count + 1, start)
    places = np.frombuffer(table, "<i8", count + 1, start + 8 * (count + 1))
    sizes = np.frombuffer(table, "<i8", count, start + 16 * (count + 1))
    doc_idx = np.frombuffer(table, "<i8", documents, start + 16 * (count + 1) + 8 * count)
    if not np.array_equal(dimensions, np.arange(count + 1)):
        raise damaged("the dimension table is not 0, 1, 2, ...", "a sequence of tokens has one dimension", path)
    if int(sizes.max()) > np.iinfo(np.int32).max or int(sizes.min()) < 0:
        wrong = int(np.argmax((sizes < 0) | (sizes > np.iinfo(np.int32).max)))
        raise damaged(f"sequence {wrong} has {sizes[wrong]} tokens", "a size is between 0 and 2147483647", path)
    total = int(sizes.sum())
    if int(places[-1]) != total:
        raise damaged(f"the last offset is {places[-1]}", f"the sizes add up to {total}", path)
    beyond = (places < 0) | (places > total)
    if beyond.any():  # times the bytes of a token it could overflow to the right number
        wrong = int(np.argmax(beyond))
        raise damaged(f"the offset of sequence {wrong} is {places[wrong]} tokens", f"there are {total} tokens", path)
    return dtype, sizes.astype(np.int32), places[:-1] * dtype.itemsize, doc_idx


def _prove_offsets(sizes: NDArray[np.int32], offsets: NDArray[np.int64], item: int, path: Path) -> int:
    """Total tokens, after proving that the offsets are the running sum of the sizes."""
    total = 0
    for at in range(0, len(sizes), BLOCK):
        piece = sizes[at : at + BLOCK].astype(np.int64)
        if piece.min() < 0:
            wrong = at + int(np.argmax(piece < 0))
            raise damaged(f"sequence {wrong} has {sizes[wrong]} tokens", "a size cannot be negative", path)
        ends = np.cumsum(piece) + total
        expected = (ends - piece) * item
        if not np.array_equal(offsets[at : at + BLOCK], expected):
            wrong = int(np.argmax(offsets[at : at + BLOCK] != expected))
            raise damaged(
                f"the offset of sequence {at + wrong} is {offsets[at + wrong]}",
                f"the sizes before it add up to byte {expected[wrong]}",
                path,
            )
        total = int(ends[-1])
    return total


def _prove_documents(boundaries: NDArray[np.int64], sequences: int, path: Path) -> None:
    """doc_idx starts at 0, never falls, and ends at N (NeoX's own merge leaves it as [0], which is let through)."""
    if len(boundaries) == 0 or boundaries[0] != 0:
        raise damaged("the document index does not start with 0", f"it has {len(boundaries)} entries", path)
    for at in range(0, len(boundaries) - 1, BLOCK):
        piece = boundaries[at : at + BLOCK + 1]
        falls = piece[1:] < piece[:-1]
        if falls.any():
            place = at + int(np.argmax(falls)) + 1
            raise damaged(f"document boundary {place} is lower than the one before", "boundaries count sequences", path)
    if len(boundaries) > 1 and boundaries[-1] != sequences:
        raise damaged(
            f"the last document boundary is {boundaries[-1]}",
            f"the index lists {sequences} sequences, they must be equal",
            path,
        )


def write_table(
    handle: IO[bytes], dtype: np.dtype[Any], sizes: NDArray[np.int32], doc_idx: NDArray[np.int64], legacy: bool = False
) -> None:
    """Write the index of these sequences, byte for byte NeoX's; `legacy` is its `--dataset-impl cached`."""
    code = next(code for code, known in DTYPES.items() if known == dtype)
    count, ends = len(sizes), np.cumsum(sizes, dtype=np.int64)
    if legacy:
        handle.write(LEGACY_HEADER.pack(LEGACY_MAGIC, VERSION, code, dtype.itemsize, count, count, len(doc_idx)))
        handle.write(np.arange(count + 1, dtype="<i8").tobytes())
        handle.write(np.concatenate([np.zeros(1, np.int64), ends]).astype("<i8").tobytes())
        handle.write(sizes.astype("<i8").tobytes())
    else:
        handle.write(HEADER.pack(MAGIC, VERSION, code, count, len(doc_idx)))
        handle.write(sizes.astype("<i4", copy=False).tobytes())
        ends -= sizes
        ends *= dtype.itemsize
        handle.write(ends.astype("<i8", copy=False).tobytes())
    handle.write(doc_idx.astype("<i8", copy=False).tobytes())
