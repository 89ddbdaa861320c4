"""What the manifest says of a file: its size and the SHA-256 of every block.

A file is cut at the boundaries of its tensors and at every multiple of BLOCK, so damage is named by tensor, a rank verifies
only what it reads, and several threads hash one file at once (hashlib gives the interpreter's lock back). A reader takes the
boundaries from the manifest. A text file is one block, its plain SHA-256.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

BLOCK = 8 << 20
_STEP = 1 << 20  # bytes handled at once, so that the hash finds them in the processor's cache


@dataclass(frozen=True)
class FileEntry:
    """size: bytes. blocks: (offset where the block ends, hex SHA-256) in file order; the last ends at `size`."""

    size: int
    blocks: tuple[tuple[int, str], ...]

    def bounds(self, index: int) -> tuple[int, int]:
        """Byte range of a block."""
        return (self.blocks[index - 1][0] if index else 0), self.blocks[index][0]

    def covering(self, start: int, stop: int) -> range:
        """The blocks that touch the bytes `[start, stop)`."""
        ends = [end for end, _ in self.blocks]
        return range(bisect_right(ends, start), bisect_left(ends, stop) + 1) if start < stop else range(0)


def file_entry(value: Mapping[str, Any]) -> FileEntry:
    """An entry from its JSON; version 1 had one hash per file.

    Raises:
        KeyError, TypeError, ValueError: a field is missing, or the blocks do not tile the file.
    """
    size = int(value["size"])
    if "sha256" in value:
        return FileEntry(size, ((size, str(value["sha256"])),))
    blocks = tuple((int(end), str(digest)) for end, digest in value["blocks"])
    ends = [0, *(end for end, _ in blocks)]
    if not blocks or ends[-1] != size or any(a >= b for a, b in pairwise(ends) if size):
        raise ValueError("the blocks of a file do not tile it")
    return FileEntry(size, blocks)


def text_entry(path: Path) -> FileEntry:
    """The entry of a small file that was written already."""
    data = path.read_bytes()
    return FileEntry(len(data), ((len(data), hashlib.sha256(data).hexdigest()),))


def read_into(fd: int, offset: int, target: memoryview, digest: Any = None) -> int:
    """Fill `target` from `offset` of a file; the bytes that were there (fewer only at the end of the file).

    digest: a hashlib object that is fed on the way.
    """
    done = 0
    while done < len(target):
        count = os.preadv(fd, [target[done : done + _STEP]], offset + done)
        if not count:
            break
        if digest is not None:
            digest.update(target[done : done + count])
        done += count
    return done
