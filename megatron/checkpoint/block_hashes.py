"""A file's entry in the manifest: its size and the SHA-256 of every block.

Blocks end at tensor boundaries and at every multiple of BLOCK. So damage is named by tensor, a rank verifies only what it
reads, and several threads hash one file at once (hashlib releases the GIL). A reader takes the boundaries from the manifest.
A text file is one block with its plain SHA-256.
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
_STEP = 1 << 20  # bytes read and hashed at once, so that they are still in the CPU cache when they are hashed


@dataclass(frozen=True)
class FileEntry:
    """Size and hashes of one file.

    Attributes:
        size: bytes.
        blocks: (offset of the block's end, hex SHA-256) in file order; the last block ends at `size`.
    """

    size: int
    blocks: tuple[tuple[int, str], ...]

    def bounds(self, index: int) -> tuple[int, int]:
        """Byte range of a block."""
        return (self.blocks[index - 1][0] if index else 0), self.blocks[index][0]

    def covering(self, start: int, stop: int) -> range:
        """Indices of the blocks that overlap the bytes `[start, stop)`."""
        ends = [end for end, _ in self.blocks]
        return range(bisect_right(ends, start), bisect_left(ends, stop) + 1) if start < stop else range(0)


def file_entry(value: Mapping[str, Any]) -> FileEntry:
    """Parse a file's entry; version 1 had one hash per file.

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
    """The entry of a small file that already exists."""
    data = path.read_bytes()
    return FileEntry(len(data), ((len(data), hashlib.sha256(data).hexdigest()),))


def read_into(fd: int, offset: int, target: memoryview, digest: Any = None) -> int:
    """Fill `target` from a file.

    Args:
        fd: descriptor open for reading.
        offset: file offset of the first byte.
        target: memory to fill.
        digest: a hashlib object to update with the bytes read.

    Returns:
        Bytes read; fewer than `len(target)` only at the end of the file.
    """
    position = 0
    while position < len(target):
        count = os.preadv(fd, [target[position : position + _STEP]], offset + position)
        if not count:
            break
        if digest is not None:
            digest.update(target[position : position + count])
        position += count
    return position
