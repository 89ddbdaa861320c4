"""Safetensors files, written as a stream with the hash taken on the way and read with every cause of failure named.

The writer is ours (the format is eight bytes of length, a JSON header and the raw bytes) because the library's own
needs the whole file in memory to hash it, and because every durable write has to pass through `megatron/files.py`.
The reader is the library's, which checks the header against the length of the file before anything is allocated.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.errors import CheckpointError
from megatron.files import atomic_open, sha256_of

_CODES: dict[torch.dtype, str] = {
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


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says of one file: bytes and hex SHA-256."""

    size: int
    sha256: str


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
        table[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins on a multiple of 8, so that mapped tensors are aligned
    return struct.pack("<Q", len(text)) + text


def _raw(tensor: Tensor) -> bytes | memoryview:
    """The bytes of a tensor in row-major order; copies only what is not already contiguous in host memory."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> FileEntry:
    """Write a safetensors file, synced to disk, and return its size and hash.

    Tensors may live on any device; one at a time is copied to the host.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing is left at `path`.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # wide types first: aligned
    digest, size = hashlib.sha256(), 0
    with ThreadPoolExecutor(1) as hasher, atomic_open(path) as handle:
        for chunk in chain([_header(tensors, order, metadata)], (_raw(tensors[name]) for name in order)):
            hashed = hasher.submit(digest.update, chunk)  # beside the writing: neither holds the interpreter's lock
            handle.write(chunk)
            hashed.result()
            size += len(chunk)
    return FileEntry(size, digest.hexdigest())


def check_file(path: Path, entry: FileEntry) -> None:
    """Compare a file with what the manifest says of it.

    Raises:
        CheckpointError: it is absent, has another size, or another content; the message says which.
    """
    if not path.is_file():
        raise CheckpointError("a file of the checkpoint is missing", where=str(path), why="manifest.json lists it")
    size = path.stat().st_size
    if size != entry.size:
        raise CheckpointError(
            "a file of the checkpoint is damaged",
            where=str(path),
            why=f"{'truncated' if size < entry.size else 'wrong size'}: {size} bytes, manifest.json says {entry.size}",
        )
    try:
        found = sha256_of(path)
    except OSError as error:
        raise CheckpointError("a file of the checkpoint cannot be read", where=str(path), why=str(error)) from error
    if found != entry.sha256:
        raise CheckpointError(
            "a file of the checkpoint is damaged",
            where=str(path),
            why=f"its SHA-256 is {found[:16]}..., manifest.json says {entry.sha256[:16]}...",
        )


class Reader:
    """An open safetensors file; reads whole tensors or slices of them, on the CPU."""

    def __init__(self, path: Path, handle: Any) -> None:
        self.path, self._handle = path, handle

    def names(self) -> list[str]:
        """Names of the tensors inside."""
        return list(self._handle.keys())

    def metadata(self) -> dict[str, str]:
        """The header's free texts."""
        return dict(self._handle.metadata() or {})

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> Tensor:
        """One tensor, or the `part` of it; a name that is absent raises CheckpointError."""
        try:
            if part is None or not part:
                return self._handle.get_tensor(name)
            return self._handle.get_slice(name)[part]
        except (SafetensorError, IndexError) as error:
            raise CheckpointError(f"cannot read '{name}'", where=str(self.path), why=str(error)) from error


@contextmanager
def open_tensors(path: Path) -> Iterator[Reader]:
    """Open a safetensors file for reading; a broken header raises CheckpointError with the cause."""
    try:
        handle = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError("cannot read a file of the checkpoint", where=str(path), why=str(error)) from error
    with handle:
        yield Reader(path, handle)
