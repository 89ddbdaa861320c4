"""Writes NeoX's token files (`token_format.py`), byte for byte what NeoX's own builder writes."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron.data.index_table import write_table
from megatron.data.token_format import CODES, Tokens, data_file, drop_sidecars, index_file
from megatron.errors import DataError
from megatron.files import atomic_open, fsync_folder


class IndexedWriter:
    """Writes a pair of files that appears under its names only when it is whole.

    Use as a context manager, or call `finish`; leaving the block by an exception removes what was written. `.idx` comes
    last, and an old `.idx` goes before a new `.bin` comes: there is no moment with two halves of different corpora.

    Args:
        prefix: path without suffix; its folder is created.
        dtype: type of a token on disk, see `dtype_for_vocab`.
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike) -> None:
        self.prefix, self.bin_path, self.idx_path = str(prefix), data_file(prefix), index_file(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODES:
            raise DataError(
                f"tokens cannot be stored as {self.dtype}", where=str(prefix), hint=f"one of {sorted(map(str, CODES))}"
            )
        self.bin_path.parent.mkdir(parents=True, exist_ok=True)
        self._sizes, self._doc_idx = array("i"), array("q", [0])
        self.total_tokens = 0
        self._stack = ExitStack()
        self._bin: IO[Any] = self._stack.enter_context(atomic_open(self.bin_path))

    def add_sequence(self, tokens: Tokens) -> None:
        """Append one sequence (it may be empty) to the open document.

        Raises:
            DataError: a token does not fit the type on disk.
        """
        values = np.asarray(tokens)
        if len(values) and self.dtype.kind in "iu":
            limits = np.iinfo(self.dtype)
            if values.dtype.kind not in "iu" or int(values.min()) < limits.min or int(values.max()) > limits.max:
                raise DataError(
                    f"a token does not fit {self.dtype.name}",
                    where=f"{self.bin_path}, sequence {len(self._sizes)}",
                    why=f"the tokens lie in {values.min()}..{values.max()} and the type holds {limits.min}..{limits.max}",
                )
        self._bin.write(values.astype(self.dtype, copy=False).tobytes())
        self._sizes.append(len(values))
        self.total_tokens += len(values)

    def end_document(self) -> None:
        """Set a document boundary after the sequences added so far."""
        self._doc_idx.append(len(self._sizes))

    def add_document(self, tokens: Tokens) -> None:
        """Append a document of one sequence."""
        self.add_sequence(tokens)
        self.end_document()

    def add_corpus(self, sizes: NDArray[np.int32], boundaries: NDArray[np.int64], blocks: Iterable[NDArray[Any]]) -> None:
        """Append another corpus: its sequences, its document boundaries (from 0), its tokens (which must fit the type on disk)."""
        base = len(self._sizes)
        for block in blocks:
            self._bin.write(block.astype(self.dtype, copy=False).tobytes())
            self.total_tokens += len(block)
        self._sizes.frombytes(np.asarray(sizes, dtype=np.int32).tobytes())
        self._doc_idx.frombytes((np.asarray(boundaries[1:], dtype=np.int64) + base).tobytes())

    def finish(self) -> None:
        """Make the pair durable under its names; a disk that is full is noticed while the old pair is still there."""
        sizes = np.frombuffer(self._sizes, np.int32) if self._sizes else np.zeros(0, np.int32)
        # Left in reverse order: `.bin` takes its name first, `.idx` last.
        with atomic_open(self.idx_path) as handle, self._stack:
            write_table(handle, self.dtype, sizes, np.frombuffer(self._doc_idx, np.int64))
            for file in (handle, self._bin):
                file.flush()
                os.fsync(file.fileno())
            self.idx_path.unlink(missing_ok=True)
            drop_sidecars(self.prefix)
            fsync_folder(self.idx_path.parent)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        else:
            self._stack.__exit__(kind, error, trace)
