"""Writing safetensors files: many at once, in chunks that several threads hash and write, synced before it returns.

The format is eight bytes of length, a JSON header and the raw bytes. The writer is ours because the library's own needs a
whole file in host memory and hashes nothing. Each chunk is copied once, into aligned memory, hashed there while the processor's
cache still holds it, and written past the page cache (`direct_io.py`); more threads than cores, so that some hash while
others wait for the disk. `safetensors_reader.py` is the other half.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron.checkpoint.block_hashes import BLOCK, FileEntry
from megatron.checkpoint.direct_io import ALIGN, Buffers, Bytes, create, write_at
from megatron.files import fsync_folder

CODES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_FILES_AT_ONCE = 32  # open at a time, so that a deep model does not run out of descriptors
_PIECE = 2 << 20  # bytes of one write: small enough that they are still in the processor's cache when the disk fetches them
_STEP = 256 << 10  # bytes copied and hashed at once, so that the hash finds them in the processor's cache
_DIRECT_FROM = 256 << 10  # bytes of a file that is worth a way past the page cache
WAITING = 3  # threads beyond one per core: that many may wait for the disk
_SYNCS = 4
Blocks = list[tuple[int, str]]


def threads() -> int:
    """Threads that compute beside each other (hash, copy), per process."""
    return max(2, min(4, len(os.sched_getaffinity(0))))


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`, `bfloat16`, ...: the name used in the manifest."""
    return str(dtype).removeprefix("torch.")


def nbytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that these tensors take in a file, header left out."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _header(tensors: Mapping[str, Tensor], order: list[str], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        table[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins on a multiple of 8, so that mapped tensors are aligned
    return struct.pack("<Q", len(text)) + text


def _raw(tensor: Tensor) -> Bytes:
    """The bytes of a tensor in row-major order; copies only what is not already contiguous in host memory."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)


def _pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[Bytes]:
    """The file as the header, then every tensor."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # wide types first: aligned
    yield np.frombuffer(_header(tensors, order, metadata), dtype=np.uint8)
    for name in order:
        yield _raw(tensors[name])


def _chunks(pieces: Iterator[Bytes]) -> Iterator[tuple[int, list[Bytes]]]:
    """(offset, what lies there): the file cut at every multiple of BLOCK and at the boundaries of its pieces."""
    offset, group, size = 0, list[Bytes](), 0
    for piece in pieces:
        at = 0
        while at < len(piece):
            group.append(piece[at : at + BLOCK - size])
            at, size = at + len(group[-1]), size + len(group[-1])
            if size == BLOCK:
                yield offset, group
                offset, group, size = offset + BLOCK, [], 0
    if group:
        yield offset, group


def _write_chunk(file: _Open, offset: int, group: list[Bytes], buffer: Bytes, hashing: bool) -> Blocks:
    """Write a chunk's parts through `buffer`; where each ends, and its hash. The work needs no interpreter's lock."""
    found: Blocks = []
    held = 0  # bytes of the buffer that are filled
    for part in group:
        digest, begin = hashlib.sha256() if hashing else None, 0
        while begin < len(part):
            piece = part[begin : begin + min(_STEP, len(buffer) - held)]
            target = buffer[held : held + len(piece)]
            np.copyto(target, piece)
            if digest is not None:
                digest.update(target.data)
            begin, held = begin + len(piece), held + len(piece)
            if held == len(buffer):
                write_at(file.fd, offset, buffer.data)
                offset, held = offset + held, 0
        found.append((offset + held, digest.hexdigest() if digest else ""))
    if held:  # what is written beyond the end is cut off when the file is whole
        write_at(file.fd, offset, buffer[: -(-held // ALIGN) * ALIGN if file.direct else held].data)
    return found


@dataclass
class _Open:
    """A file that is being written."""

    fd: int
    direct: bool
    futures: list[Future[Blocks]] = field(default_factory=list)
    sync: Future[None] | None = None


class _Writer:
    """The threads of one call, and as many chunks in host memory as there are threads."""

    def __init__(self, folder: Path, metadata: Mapping[str, str], hashing: bool) -> None:
        self.folder, self.metadata, self.hashing = folder, metadata, hashing
        count = threads() + WAITING
        self.work, self.sync = ThreadPoolExecutor(count, "write"), ThreadPoolExecutor(_SYNCS, "sync")
        self.buffers = Buffers(count, _PIECE)
        self.room = threading.BoundedSemaphore(2 * count)
        self.open: dict[str, _Open] = {}
        self.entries: dict[str, FileEntry] = {}
        self.failed: BaseException | None = None

    def _task(self, file: _Open, offset: int, group: list[Bytes]) -> Blocks:
        buffer = self.buffers.take()
        try:
            return _write_chunk(file, offset, group, buffer, self.hashing)
        except BaseException as error:
            self.failed = error
            raise
        finally:
            self.buffers.give(buffer)
            self.room.release()

    def add(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Hand one file to the threads; returns when all of its chunks are queued."""
        if len(self.open) >= _FILES_AT_ONCE:
            self.finish(next(iter(self.open)))
        direct = nbytes(tensors) >= _DIRECT_FROM
        file = self.open[name] = _Open(create(self.folder / name, direct), direct)
        for offset, group in _chunks(_pieces(tensors, self.metadata)):
            self.room.acquire()
            if self.failed is not None:  # a full disk: do not hash the rest for nothing
                raise self.failed
            file.futures.append(self.work.submit(self._task, file, offset, group))

    def begin_sync(self, name: str) -> None:
        """Wait for a file's chunks and begin to make it durable."""
        file = self.open[name]
        blocks = tuple(block for future in file.futures for block in future.result())
        self.entries[name] = FileEntry(blocks[-1][0], blocks)
        if file.direct:
            os.ftruncate(file.fd, blocks[-1][0])
        file.sync = self.sync.submit(os.fsync, file.fd)

    def finish(self, name: str) -> None:
        """Wait until a file is durable."""
        if name not in self.entries:
            self.begin_sync(name)
        file = self.open[name]
        assert file.sync is not None
        file.sync.result()
        del self.open[name]
        os.close(file.fd)

    def close(self) -> None:
        """End the threads, then close what an error left open."""
        self.work.shutdown(cancel_futures=True)
        self.sync.shutdown(cancel_futures=True)
        for file in self.open.values():
            os.close(file.fd)


def write_files(
    folder: Path, files: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, str], *, hashing: bool = True
) -> dict[str, FileEntry]:
    """Write safetensors files into a folder that nobody reads yet; all are synced when it returns.

    Args:
        files: file name -> its tensors, on any device; a few blocks at a time are held in host memory.
        metadata: texts for the header of each. hashing: False leaves the hashes empty (to measure what they cost).

    Returns:
        file name -> its size and the hashes of its blocks.

    Raises:
        OSError: a file exists, the disk is full, the folder cannot be written; what was begun is left for the caller.
    """
    writer = _Writer(folder, metadata, hashing)
    try:
        for name, tensors in files.items():
            writer.add(name, tensors)
        for step in (writer.begin_sync, writer.finish):
            for name in list(writer.open):
                step(name)
    finally:
        writer.close()
    return writer.entries


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> FileEntry:
    """Write one safetensors file that is whole or absent, and return its entry.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing is left at `path`.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        entry = write_files(path.parent, {temporary.name: tensors}, metadata)[temporary.name]
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    return entry
