"""Writing safetensors files: many at once, in blocks that several threads hash and write, synced before it returns.

The format is eight bytes of length, a JSON header and the raw bytes. The writer is ours because the library's own needs a
whole file in host memory and hashes nothing; one pass here costs what writing alone costs while a core is idle, since
neither `pwrite` nor SHA-256 holds the interpreter's lock. `reader.py` is the other half.
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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.blocks import BLOCK, FileEntry, write_at
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
_SYNC_EVERY = 256 << 20  # bytes of one file between two starts of the disk, which works while the next ones are hashed
Blocks = list[tuple[int, str]]


def threads() -> int:
    """Threads that hash and read or write beside each other, per process."""
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


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; copies only what is not already contiguous in host memory."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _blocks(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[memoryview]:
    """The file as blocks: the header, then every tensor, cut where it is long."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # wide types first: aligned
    yield memoryview(_header(tensors, order, metadata))
    for name in order:
        raw = _raw(tensors[name])
        yield from (raw[at : at + BLOCK] for at in range(0, len(raw), BLOCK))


def _groups(blocks: Iterator[memoryview]) -> Iterator[tuple[int, list[memoryview]]]:
    """(offset, consecutive blocks of together at most BLOCK bytes): one piece of work, however small the tensors are."""
    offset, group, size = 0, list[memoryview](), 0
    for block in blocks:
        if group and size + len(block) > BLOCK:
            yield offset, group
            offset, group, size = offset + size, [], 0
        group.append(block)
        size += len(block)
    yield offset, group


def _put(fd: int, offset: int, group: list[memoryview], hashing: bool) -> Blocks:
    """Write consecutive blocks; where each ends, and its hash."""
    found: Blocks = []
    for block in group:  # one by one: joining small ones would cost fresh memory, and more time than the calls
        digest = hashlib.sha256() if hashing else None
        write_at(fd, offset, block, digest)
        offset += len(block)
        found.append((offset, digest.hexdigest() if digest else ""))
    return found


class _Writer:
    """The threads of one call, and at most twice as many blocks in host memory as there are threads."""

    def __init__(self, folder: Path, metadata: Mapping[str, str], hashing: bool) -> None:
        self.folder, self.metadata, self.hashing = folder, metadata, hashing
        self.work, self.sync = ThreadPoolExecutor(threads(), "write"), ThreadPoolExecutor(2, "sync")
        self.room = threading.BoundedSemaphore(2 * threads())
        self.open: dict[str, tuple[int, list[Future[Blocks]]]] = {}
        self.syncs: dict[int, list[Future[None]]] = {}
        self.entries: dict[str, FileEntry] = {}
        self.failed: BaseException | None = None

    def _task(self, fd: int, offset: int, group: list[memoryview]) -> Blocks:
        try:
            return _put(fd, offset, group, self.hashing)
        except BaseException as error:
            self.failed = error
            raise
        finally:
            self.room.release()

    def add(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Hand one file to the threads; returns when all of its blocks are queued."""
        if len(self.open) >= _FILES_AT_ONCE:
            self.finish(next(iter(self.open)))
        fd = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        futures: list[Future[Blocks]] = []
        self.open[name] = (fd, futures)
        started = 0
        for offset, group in _groups(_blocks(tensors, self.metadata)):
            self.room.acquire()
            if self.failed is not None:  # a full disk: do not hash the rest for nothing
                raise self.failed
            futures.append(self.work.submit(self._task, fd, offset, group))
            if offset - started >= _SYNC_EVERY:
                started = offset
                self.syncs.setdefault(fd, []).append(self.sync.submit(os.fdatasync, fd))

    def begin_sync(self, name: str) -> None:
        """Wait for a file's blocks and begin to make it durable."""
        fd, futures = self.open[name]
        blocks = tuple(block for future in futures for block in future.result())
        self.entries[name] = FileEntry(blocks[-1][0], blocks)
        self.syncs.setdefault(fd, []).append(self.sync.submit(os.fsync, fd))

    def finish(self, name: str) -> None:
        """Wait until a file is durable."""
        if name not in self.entries:
            self.begin_sync(name)
        fd = self.open[name][0]
        for future in self.syncs.pop(fd, ()):
            future.result()
        del self.open[name]
        os.close(fd)

    def close(self) -> None:
        """End the threads, then close what an error left open."""
        self.work.shutdown(cancel_futures=True)
        self.sync.shutdown(cancel_futures=True)
        for fd, _ in self.open.values():
            os.close(fd)


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
