"""Token files in the making that survive a kill: parts on disk, and a journal that says how much of them is true.

`PREFIX.bin.part`, `.sizes.part` and `.docs.part` only grow; the journal is replaced atomically after they are on the disk.
After a kill each part is cut to the journal's length and writing goes on behind it, so the finished pair has the same bytes
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


class Part:
    """A file that grows from a known length; `commit` makes what was added durable.

    Args:
        path: made if it is not there, and locked against a second process.
        length: bytes to keep.

    Raises:
        DataError: another process writes it, or it is shorter than `length`.
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


class PairParts:
    """One pair of token files in the making; byte for byte what `IndexedWriter` makes.

    Args:
        prefix: path without suffix.
        dtype: type of a token on disk.
        state: what `commit` returned when the run was interrupted; None begins again.
        legacy: write the index in NeoX's legacy format.
    """

    def __init__(self, prefix: str, dtype: np.dtype[Any], state: Sequence[int] | None = None, legacy: bool = False) -> None:
        self.prefix, self.dtype, self.legacy = prefix, dtype, legacy
        self.tokens, self.sequences, self.boundaries = state or (0, 0, 1)
        self._bin = Part(Path(f"{prefix}.bin.part"), self.tokens * dtype.itemsize)
        self._sizes = Part(Path(f"{prefix}.sizes.part"), 4 * self.sequences)
        self._docs = Part(Path(f"{prefix}.docs.part"), 8 * self.boundaries if state else 0)
        if state is None:
            self._docs.write(bytes(8))

    def add(self, tokens: NDArray[Any] | None) -> None:
        """As NeoX: no text leaves no trace; text without a token (a blank for some tokenizers) leaves a boundary only."""
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
        """The state after making everything durable."""
        for part in (self._bin, self._sizes, self._docs):
            part.commit()
        return [self.tokens, self.sequences, self.boundaries]

    def close(self) -> None:
        """Leave the parts as they are."""
        for part in (self._bin, self._sizes, self._docs):
            part.close()

    def discard(self) -> None:
        """Close and remove the parts."""
        self.close()
        for part in (self._bin, self._sizes, self._docs):
            part.path.unlink(missing_ok=True)


def publish_pair(prefix: str, dtype: np.dtype[Any], legacy: bool) -> None:
    """Give committed parts their names; may be repeated after a kill. There is no moment with halves of two corpora."""
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


def remove_parts(prefix: str) -> None:
    """Remove what publishing needed, and temporary files that killed runs left."""
    for kind in ("sizes", "docs"):
        Path(f"{prefix}.{kind}.part").unlink(missing_ok=True)
    path = Path(prefix)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            left.unlink()
