"""Reads NeoX's token files (`token_format.py`), so that old corpora keep their worth.

Nothing in a file is believed before it is proved: every number of the table is compared with the other numbers and with the
lengths of the two files, and no array is larger than the file it came from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.indexed_writer import IndexedWriter
from megatron.data.token_format import (
    BLOCK,
    DTYPES,
    HEADER,
    LEGACY_MAGIC,
    MAGIC,
    VERSION,
    data_file,
    dtype_for_vocab,
    index_file,
)
from megatron.errors import DataError

__all__ = ["IndexedDataset", "IndexedWriter", "dtype_for_vocab"]


def _require(path: Path, prefix: str | Path) -> None:
    if path.is_file():
        return
    hint = "make the pair with tools/datasets/preprocess_data.py or prepare_data.py; data_path is the common name of both files"
    if str(prefix).endswith((".bin", ".idx")):
        hint = f"give the prefix without its suffix: {str(prefix)[:-4]}"
    raise DataError("a token file is missing", where=str(path), why="no file of that name", hint=hint)


class IndexedDataset:
    """A read-only corpus of token sequences, mapped into memory.

    Args:
        prefix: path without `.bin` / `.idx`.

    Attributes:
        sizes: i32 [N], tokens per sequence.
        offsets: i64 [N], first byte of each sequence in `.bin`.
        doc_idx: i64 [D], sequences before each document border.
        dtype: type of a token on disk.

    Raises:
        DataError: a file is missing, cut, too long, of another format, or its numbers contradict each other.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.bin_path, self.idx_path = data_file(prefix), index_file(prefix)
        _require(self.idx_path, prefix)
        _require(self.bin_path, prefix)
        self.dtype, count, documents = self._read_header()
        table = np.memmap(self.idx_path, dtype=np.uint8, mode="r")
        start = HEADER.size
        self.sizes: NDArray[np.int32] = np.frombuffer(table, "<i4", count, start)
        self.offsets: NDArray[np.int64] = np.frombuffer(table, "<i8", count, start + 4 * count)
        self.doc_idx: NDArray[np.int64] = np.frombuffer(table, "<i8", documents, start + 12 * count)
        self.total_tokens = self._prove_offsets()
        self._prove_documents()
        self._prove_data_length()
        self._tokens: NDArray[Any] = np.memmap(self.bin_path, dtype=self.dtype, mode="r")

    def __len__(self) -> int:
        return len(self.sizes)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> NDArray[Any]:
        """Tokens `[offset : offset + length]` of one sequence, as a view of the file (no copy).

        Raises:
            DataError: no such sequence, or the piece does not lie inside it.
        """
        if not 0 <= index < len(self.sizes):
            raise DataError(
                f"sequence {index} does not exist", where=self.prefix, why=f"there are {len(self)} sequences"
            )
        size = int(self.sizes[index])
        length = size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > size:
            raise DataError(
                f"tokens {offset}..{offset + length} are outside the sequence",
                where=f"{self.prefix}, sequence {index}",
                why=f"it has {size} tokens",
            )
        first = int(self.offsets[index]) // self.dtype.itemsize + offset
        return self._tokens[first : first + length]

    def max_token(self) -> int:
        """The largest token id; reads the whole `.bin` in blocks."""
        return max(int(self._tokens[at : at + BLOCK].max()) for at in range(0, len(self._tokens), BLOCK))

    def require_integers(self) -> None:
        """Raise a DataError unless the entries are integers, which is what a token is."""
        if self.dtype.kind not in "iu":
            raise DataError(
                "this file holds no tokens",
                where=str(self.idx_path),
                why=f"its entries are {self.dtype.name}; token ids are integers",
            )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Prove that every token id is in `[0, vocab_size)`; reads the whole `.bin` unless its type cannot hold a wrong id.

        Raises:
            DataError: names the first wrong token, its sequence and its place in it.
        """
        self.require_integers()
        if self.dtype.kind == "u" and np.iinfo(self.dtype).max < vocab_size:
            return
        for at in range(0, len(self._tokens), BLOCK):
            block = self._tokens[at : at + BLOCK]
            if int(block.max()) >= vocab_size or int(block.min()) < 0:
                wrong = int(np.argmax((block >= vocab_size) | (block < 0)))
                raise self.wrong_token(at + wrong, int(block[wrong]), vocab_size)

    def wrong_token(self, position: int, token: int, vocab_size: int) -> DataError:
        """The error for `token` at `position` (counted in tokens from the start of `.bin`) that the vocabulary lacks."""
        sequence = int(np.searchsorted(self.offsets, position * self.dtype.itemsize, side="right")) - 1
        inside = position - int(self.offsets[sequence]) // self.dtype.itemsize
        return DataError(
            f"token id {token} is outside the vocabulary of {vocab_size} entries",
            where=f"{self.bin_path}, sequence {sequence}, token {inside}",
            why="the corpus was made with another tokenizer, or the file is damaged",
            hint="use the tokenizer the corpus was made with (tokenizer_type, vocab_file), or prepare the corpus again",
        )

    def _damaged(self, what: str, why: str, path: Path | None = None) -> DataError:
        return DataError(
            what,
            where=str(path or self.idx_path),
            why=why,
            hint="the file is damaged or only partly copied: copy or prepare it again",
        )

    def _read_header(self) -> tuple[np.dtype[Any], int, int]:
        """Token type, N and D, after comparing them with the length of the file, in Python integers that cannot overflow."""
        length = self.idx_path.stat().st_size
        with open(self.idx_path, "rb") as handle:
            head = handle.read(HEADER.size)
        if head.startswith(LEGACY_MAGIC):
            raise DataError(
                "the index has the legacy format (data_impl: cached)",
                where=str(self.idx_path),
                why="only the mmap format is read",
                hint="write the corpus again with tools/datasets/preprocess_data.py --dataset-impl mmap",
            )
        if head[: len(MAGIC)] != MAGIC:
            raise self._damaged("not a token index", f"it starts with {head[: len(MAGIC)]!r}, not {MAGIC!r}")
        if len(head) < HEADER.size:
            raise self._damaged("the index is cut", f"{length} bytes, the header alone has {HEADER.size}")
        _, version, code, count, documents = HEADER.unpack(head)
        if version != VERSION:
            raise self._damaged(f"index version {version} is not known", f"only version {VERSION} exists (bytes 9..16)")
        if code not in DTYPES:
            raise self._damaged(f"dtype code {code} is not known", f"byte 17 must be one of {sorted(DTYPES)}")
        expected = HEADER.size + 12 * count + 8 * documents
        if length != expected:
            state = "cut" if length < expected else "too long"
            raise self._damaged(
                f"the index is {state}: {length} bytes instead of {expected}",
                f"the header promises {count} sequences and {documents} document borders",
            )
        if count == 0:
            raise DataError("the corpus is empty", where=str(self.idx_path), why="the index lists no sequence")
        return DTYPES[code], count, documents

    def _prove_offsets(self) -> int:
        """Total tokens, after proving that the offsets are the running sum of the sizes."""
        total, item = 0, self.dtype.itemsize
        for at in range(0, len(self.sizes), BLOCK):
            sizes = self.sizes[at : at + BLOCK].astype(np.int64)
            if sizes.min() < 0:
                wrong = at + int(np.argmax(sizes < 0))
                raise self._damaged(f"sequence {wrong} has {self.sizes[wrong]} tokens", "a size cannot be negative")
            ends = np.cumsum(sizes) + total
            expected = (ends - sizes) * item
            if not np.array_equal(self.offsets[at : at + BLOCK], expected):
                wrong = int(np.argmax(self.offsets[at : at + BLOCK] != expected))
                raise self._damaged(
                    f"the offset of sequence {at + wrong} is {self.offsets[at + wrong]}",
                    f"the sizes before it add up to byte {expected[wrong]}",
                )
            total = int(ends[-1])
        return total

    def _prove_documents(self) -> None:
        """doc_idx starts at 0, never falls, and ends at N (NeoX's own merge leaves it as [0], which is let through)."""
        borders = self.doc_idx
        if len(borders) == 0 or borders[0] != 0:
            raise self._damaged("the document index does not start with 0", f"it has {len(borders)} entries")
        for at in range(0, len(borders) - 1, BLOCK):
            piece = borders[at : at + BLOCK + 1]
            falls = piece[1:] < piece[:-1]
            if falls.any():
                raise self._damaged(
                    f"document border {at + int(np.argmax(falls)) + 1} is lower than the one before", ""
                )
        if len(borders) > 1 and borders[-1] != len(self):
            raise self._damaged(
                f"the last document border is {borders[-1]}",
                f"the index lists {len(self)} sequences, they must be equal",
            )

    def _prove_data_length(self) -> None:
        expected, length = self.total_tokens * self.dtype.itemsize, self.bin_path.stat().st_size
        if length != expected:
            state = "cut" if length < expected else "too long"
            raise self._damaged(
                f"the token file is {state}: {length} bytes instead of {expected}",
                f"{self.idx_path.name} promises {self.total_tokens} tokens of {self.dtype.itemsize} bytes",
                self.bin_path,
            )
        if expected == 0:
            raise DataError("the corpus is empty", where=str(self.bin_path), why="all its sequences have no token")
