"""Unfinished token files that survive a kill: partial files on disk, and a journal of their committed lengths.

`PREFIX.bin.part`, `.sizes.part` and `.docs.part` only grow; the journal is replaced atomically after they are synced to disk.
After a kill each file is truncated to the journal's length and writing resumes there, so the finished pair has the same bytes
as without the kill.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.index_table import write_table
from megatron.data.token_format import data_file, drop_sidecars, index_file
from megatron.errors import DataError
from megatron.files import atomic_open, fsync_folder


class PartialFile:
    """A file that grows from a known length; `commit` makes what was added durable.

    Args:
        path: created if it does not exist; locked against a second process.
        length: bytes to keep.

    Raises:
        DataError: another process holds the lock, or the file is shorter than `length`.
    """

    def __init__(self, path: Path, length: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._handle: IO[bytes] = open(path, "ab")  # noqa: SIM115  closed by `close`
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._handle.close()
            hint = "wait for it, or give another --output-prefix"
            raise DataError("another process writes this file", where=str(path), why="it is locked", hint=hint) from None
        except OSError:
            pass  # a file system without locks
        if os.fstat(self._handle.fileno()).st_size < length:
            self._handle.close()
            raise DataError(
                "a part of an interrupted run is missing",
                where=str(path),
                why=f"it should have {length} bytes",
                hint="delete the .part and .progress.json files of this output and start again",
            )
        self._handle.truncate(length)
        self._handle.seek(length)

    def write(self, data: bytes) -> None:
        """Append."""
        self._handle.write(data)

    def commit(self) -> None:
        """Make everything written so far durable."""
        self._handle.flush()
        os.fsync(self._handle.fileno())

    def close(self) -> None:
        """Close without making anything durable."""
        self._handle.close()


class PartialPair:
    """One unfinished pair of token files; byte for byte what `IndexedWriter` writes.

    Args:
        prefix: path without suffix.
        dtype: type of a token on disk.
        state: the last result of `commit` before the interruption; None starts from scratch.
        legacy: write the index in NeoX's legacy format.
    """

    def __init__(self, prefix: str, dtype: np.dtype[Any], state: Sequence[int] | None = None, legacy: bool = False) -> None:
        self.prefix, self.dtype, self.legacy = prefix, dtype, legacy
        self.tokens, self.sequences, self.boundaries = state or (0, 0, 1)
        self._bin = PartialFile(Path(f"{prefix}.bin.part"), self.tokens * dtype.itemsize)
        self._sizes = PartialFile(Path(f"{prefix}.sizes.part"), 4 * self.sequences)
        self._docs = PartialFile(Path(f"{prefix}.docs.part"), 8 * self.boundaries if state else 0)
        if state is None:
            self._docs.write(bytes(8))

    def add(self, tokens: NDArray[Any] | None) -> None:
        """Append a document. As in NeoX, no text (None) adds nothing; text without tokens adds a boundary only."""
        if tokens is None:
            return
        if len(tokens):
            self._bin.write(tokens.astype(self.dtype, copy=False).tobytes())
            self._sizes.write(len(tokens).to_bytes(4, "little"))
            self.tokens += len(tokens)
            self.sequences += 1
        self._docs.write(self.sequences.to_bytes(8, "little"))
        self.boundaries += 1

    def commit(self) -> list[int]:
        """Make everything durable and return the state."""
        for file in (self._bin, self._sizes, self._docs):
            file.commit()
        return [self.tokens, self.sequences, self.boundaries]

    def close(self) -> None:
        """Close the files without a commit."""
        for file in (self._bin, self._sizes, self._docs):
            file.close()

    def discard(self) -> None:
        """Close and remove the files."""
        self.close()
        for file in (self._bin, self._sizes, self._docs):
            file.path.unlink(missing_ok=True)


def publish_pair(prefix: str, dtype: np.dtype[Any], legacy: bool) -> None:
    """Rename committed files to their final names; repeatable after a kill. A reader never sees files of two corpora."""
    path, part = data_file(prefix), Path(f"{prefix}.bin.part")
    if part.exists():
        index_file(prefix).unlink(missing_ok=True)
        drop_sidecars(prefix)
        fsync_folder(path.parent)
        os.replace(part, path)
        fsync_folder(path.parent)
    sizes = _column(f"{prefix}.sizes.part", "<i4")
    boundaries = _column(f"{prefix}.docs.part", "<i8")
    with atomic_open(index_file(prefix)) as handle:
        write_table(handle, dtype, sizes, boundaries, legacy)


def _column(path: str, dtype: str) -> NDArray[Any]:
    return np.memmap(path, dtype=dtype, mode="r") if os.path.getsize(path) else np.zeros(0, dtype)


def remove_partial_files(prefix: str) -> None:
    """Remove the partial files after publishing, and temporary files of killed runs."""
    for kind in ("sizes", "docs"):
        Path(f"{prefix}.{kind}.part").unlink(missing_ok=True)
    path = Path(prefix)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            leftover.unlink()
