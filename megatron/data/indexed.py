"""Reads NeoX's token files (`token_format.py`), the legacy format too, so that old corpora keep their worth.

Opening proves the table (`index_table.py`), the length of the tokens, and what the checksums, if there are any, can tell
quickly.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.checksums import check_ends
from megatron.data.corpus_request import command_that_makes
from megatron.data.index_table import damaged, read_table
from megatron.data.indexed_writer import IndexedWriter
from megatron.data.token_format import BLOCK, data_file, dtype_for_vocab, index_file
from megatron.errors import DataError

__all__ = ["IndexedDataset", "IndexedWriter", "dtype_for_vocab"]


def _require(path: Path, prefix: str | Path) -> None:
    if path.is_file():
        return
    hint = "make the pair with tools/datasets/preprocess_data.py or prepare_data.py; data_path is the common name of both files"
    if command := command_that_makes(path):
        hint = f"{command} makes it"
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
        doc_idx: i64 [D], sequences before each document boundary.
        dtype: type of a token on disk.
        total_tokens: tokens of all sequences.

    Raises:
        DataError: a file is missing, cut, too long, of another format, or its numbers contradict each other.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.bin_path, self.idx_path = data_file(prefix), index_file(prefix)
        _require(self.idx_path, prefix)
        _require(self.bin_path, prefix)
        table = read_table(self.idx_path)
        self.dtype, self.total_tokens, self.legacy = table.dtype, table.total_tokens, table.legacy
        self.sizes, self.offsets, self.doc_idx = table.sizes, table.offsets, table.doc_idx
        self._prove_data_length()
        check_ends(prefix)
        self._tokens: NDArray[Any] = np.memmap(self.bin_path, dtype=self.dtype, mode="r")

    def __len__(self) -> int:
        return len(self.sizes)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> NDArray[Any]:
        """Tokens `[offset : offset + length]` of one sequence, as a view of the file (no copy).

        Raises:
            DataError: no such sequence, or the piece does not lie inside it.
        """
        if not 0 <= index < len(self.sizes):
            raise DataError(f"sequence {index} does not exist", where=self.prefix, why=f"there are {len(self)} sequences")
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

    def blocks(self) -> Iterator[NDArray[Any]]:
        """All tokens in order, as views of `BLOCK` tokens; reading them once also warms the page cache (`mmap_warmup`)."""
        for at in range(0, len(self._tokens), BLOCK):
            yield self._tokens[at : at + BLOCK]

    def document_borders(self) -> NDArray[np.int64]:
        """i64 [documents + 1]: `doc_idx`, or one document per sequence where NeoX's merge lost it."""
        return self.doc_idx if len(self.doc_idx) > 1 else np.arange(len(self) + 1, dtype=np.int64)

    def max_token(self) -> int:
        """The largest token id; reads the whole `.bin` in blocks."""
        return max(int(block.max()) for block in self.blocks())

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

    def _prove_data_length(self) -> None:
        expected, length = self.total_tokens * self.dtype.itemsize, self.bin_path.stat().st_size
        if length != expected:
            state = "cut" if length < expected else "too long"
            raise damaged(
                f"the token file is {state}: {length} bytes instead of {expected}",
                f"{self.idx_path.name} promises {self.total_tokens} tokens of {self.dtype.itemsize} bytes",
                self.bin_path,
            )
        if expected == 0:
            raise DataError("the corpus is empty", where=str(self.bin_path), why="all its sequences have no token")
