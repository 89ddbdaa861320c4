"""Large writes that bypass the page cache where the file system allows it (`O_DIRECT`).

A checkpoint is written once and, in a run that goes well, never read. Bypassing the cache, a save costs the CPU one copy into
aligned memory instead of the kernel's copy, page allocation and write-back; the disk starts with the first chunk instead of
at the final sync; and the training data stays cached. Where direct writes are refused (at open or later), the same calls go
through the cache: only the speed depends on it.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import queue
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ALIGN = 4096  # of offsets, lengths and addresses: every disk's sector divides it
Bytes = NDArray[np.uint8]


class Buffers:
    """A pool of `count` page-aligned buffers of `size` bytes, allocated on first use and reused."""

    def __init__(self, count: int, size: int) -> None:
        self._size, self._free = size, queue.SimpleQueue[Bytes | None]()
        for _ in range(count):
            self._free.put(None)

    def take(self) -> Bytes:
        """Take a buffer; blocks while all are in use."""
        buffer = self._free.get()
        return np.frombuffer(mmap.mmap(-1, self._size), dtype=np.uint8) if buffer is None else buffer

    def give(self, buffer: Bytes) -> None:
        """Return a buffer to the pool."""
        self._free.put(buffer)


def create(path: Path, direct: bool) -> int:
    """Create a file for writing, with `O_DIRECT` if `direct` is set and the file system supports it.

    Raises:
        OSError: it exists, or cannot be created.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags | (os.O_DIRECT if direct else 0), 0o666)
    except OSError as error:
        if not direct or error.errno != errno.EINVAL:
            raise
        path.unlink(missing_ok=True)  # some file systems refuse only after creating it
        return os.open(path, flags, 0o666)


def _disable_direct(fd: int) -> bool:
    """Clear `O_DIRECT` on a descriptor; returns whether it was set."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    return bool(flags & os.O_DIRECT)


def write_at(fd: int, offset: int, data: memoryview) -> None:
    """Write all of `data` at `offset`; with `O_DIRECT`, address, offset and length must be multiples of ALIGN.

    Raises:
        OSError: the disk is full or broken.
    """
    position = 0
    while position < len(data):
        try:
            position += os.pwrite(fd, data[position:], offset + position)
        except OSError as error:
            # EINVAL: the file system takes no direct write of this shape, or a short write left an unaligned rest.
            if error.errno != errno.EINVAL or not _disable_direct(fd):
                raise
