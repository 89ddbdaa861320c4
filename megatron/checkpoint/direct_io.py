"""Large reads and writes that go past the page cache where the file system allows it (`O_DIRECT`).

A checkpoint is written once and, in a run that goes well, never read. Past the cache a save costs the processor one copy into
aligned memory instead of the kernel's copy, its page allocation and the write-back of it; the disk works from the first
chunk on instead of at the final sync; and the training data stay cached. Where direct writing is refused (at the
opening or later), the same calls go through the cache: nothing but the speed depends on it.
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
    """`count` buffers of `size` bytes on page boundaries, made when they are first needed and used again."""

    def __init__(self, count: int, size: int) -> None:
        self._size, self._free = size, queue.SimpleQueue[Bytes | None]()
        for _ in range(count):
            self._free.put(None)

    def take(self) -> Bytes:
        """A buffer; waits while all are out."""
        found = self._free.get()
        return np.frombuffer(mmap.mmap(-1, self._size), dtype=np.uint8) if found is None else found

    def give(self, buffer: Bytes) -> None:
        """Back for the next one."""
        self._free.put(buffer)


def create(path: Path, direct: bool) -> int:
    """A new file for writing, past the page cache if `direct` and the file system can.

    Raises:
        OSError: it exists, or cannot be made.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags | (os.O_DIRECT if direct else 0), 0o666)
    except OSError as error:
        if not direct or error.errno != errno.EINVAL:
            raise
        path.unlink(missing_ok=True)  # some file systems refuse after they have made it
        return os.open(path, flags, 0o666)


def _through_cache(fd: int) -> bool:
    """Let a descriptor write through the page cache from here on; whether it did not before."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    return bool(flags & os.O_DIRECT)


def write_at(fd: int, offset: int, data: memoryview) -> None:
    """Write all of `data` at `offset`; for a direct file all three must be multiples of ALIGN.

    Raises:
        OSError: the disk is full or broken.
    """
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(fd, data[done:], offset + done)
        except OSError as error:
            if error.errno != errno.EINVAL or not _through_cache(fd):
                raise
