"""Reading safetensors files in one pass: each block is hashed right after it is read, every cause of failure is named.

Only the asked ranges are read, rounded to whole blocks when they are verified. Bytes go straight into the memory of the
tensor that is returned. A read error is an `OSError` here and so a damaged file (a mapped file would end the process).
"""

from __future__ import annotations

import hashlib
import os
import struct
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.block_hashes import FileEntry, read_into
from megatron.checkpoint.damage import DamagedCheckpoint
from megatron.checkpoint.safetensors_writer import CODES, threads
from megatron.files import open_regular, parse_json

_DTYPES = {code: dtype for dtype, code in CODES.items()}
_LONGEST_HEADER = 100 << 20
_HINT = 1 << 20


def _damaged(path: Path, why: str) -> DamagedCheckpoint:
    return DamagedCheckpoint("a file of the checkpoint is damaged", where=str(path), why=why)


def open_file(path: Path, entry: FileEntry) -> int:
    """A descriptor of a file whose presence and size agree with the manifest."""
    try:
        fd = open_regular(path)
        size = os.fstat(fd).st_size
    except FileNotFoundError:
        raise DamagedCheckpoint("a file of the checkpoint is missing", where=str(path), why="manifest.json lists it") from None
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint("a file of the checkpoint cannot be read", where=str(path), why=str(error)) from error
    if size == entry.size:
        return fd
    os.close(fd)
    word = "truncated" if size < entry.size else "wrong size"
    raise _damaged(path, f"{word}: {size} bytes, manifest.json says {entry.size}")


def read_exactly(path: Path, fd: int, offset: int, target: memoryview, digest: Any = None) -> None:
    """Fill `target` from a file, feeding `digest`; a read error or an early end raises DamagedCheckpoint."""
    try:
        count = read_into(fd, offset, target, digest)
    except OSError as error:
        raise DamagedCheckpoint("a file of the checkpoint cannot be read", where=str(path), why=str(error)) from error
    if count < len(target):
        raise _damaged(path, f"it ends at byte {offset + count}")


def mismatch(found: str, digest: str) -> str:
    """Empty when two SHA-256 are equal, else both beginnings."""
    return "" if found == digest else f"its SHA-256 is {found[:16]}..., manifest.json says {digest[:16]}..."


def _sha256(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


def _is_row(row: Any, length: int) -> bool:
    """Whether a header's row is a tensor inside `length` bytes of data."""
    if not isinstance(row, dict) or not isinstance(row.get("dtype"), str) or row["dtype"] not in _DTYPES:
        return False
    shape, ends = row.get("shape"), row.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(ends, list) or len(ends) != 2:
        return False
    if not all(type(n) is int and n >= 0 for n in [*shape, *ends]):
        return False
    size = prod(shape) * _DTYPES[row["dtype"]].itemsize
    return bool(ends[1] <= length and ends[1] - ends[0] == size)


class Reader:
    """One open file of a checkpoint.

    Args:
        path, entry: the file and what the manifest says of it. verify: compare hashes; sizes are always compared.
        pool: threads that read and hash.

    Raises:
        DamagedCheckpoint: the file is absent, cut, altered in its header, or not a safetensors file.
    """

    def __init__(self, path: Path, entry: FileEntry, pool: ThreadPoolExecutor, verify: bool = True) -> None:
        self.path, self.entry, self.verify, self._pool = path, entry, verify, pool
        self._fd = open_file(path, entry)
        try:
            if verify and len(entry.blocks) == 1:  # of version 1, which hashed files as a whole
                self._compare(0, _sha256(self._bytes(0, entry.size)), "the file")
                self.verify = False
            self._table, self._base = self._header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; tensors that were returned stay."""
        os.close(self._fd)

    def _header(self) -> tuple[dict[str, Any], int]:
        size = self.entry.size
        length = struct.unpack("<Q", self._bytes(0, 8))[0] if size >= 8 else size
        if length > min(size - 8, _LONGEST_HEADER):
            raise _damaged(self.path, f"its header claims {length} bytes, the file has {size}")
        data = self._bytes(0, 8 + length)
        if self.verify:
            if self.entry.blocks[0][0] != 8 + length:
                raise _damaged(self.path, f"its header claims {length} bytes, manifest.json disagrees")
            self._compare(0, _sha256(data), "the header")
        try:
            table = parse_json(data[8:])
        except ValueError as error:
            raise _damaged(self.path, f"its header is not JSON ({error})") from error
        rows = {name: row for name, row in table.items() if name != "__metadata__"} if isinstance(table, dict) else {"": 0}
        texts = table.get("__metadata__", {}) if isinstance(table, dict) else {}
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise _damaged(self.path, "the free texts of its header are none")
        bad = next((name for name, row in rows.items() if not _is_row(row, size - 8 - length)), None)
        if bad is not None:
            raise _damaged(self.path, f"the header's entry of '{bad}' is wrong")
        return table, 8 + length

    def _bytes(self, start: int, stop: int) -> bytearray:
        data = bytearray(stop - start)
        read_exactly(self.path, self._fd, start, memoryview(data))
        return data

    def _compare(self, index: int, found: str, what: str) -> None:
        problem = mismatch(found, self.entry.blocks[index][1])
        if problem:
            start, stop = self.entry.bounds(index)
            raise _damaged(self.path, f"{what} (bytes {start} to {stop}): {problem}")

    def names(self) -> list[str]:
        """Names of the tensors inside."""
        return [name for name in self._table if name != "__metadata__"]

    def form(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor; an absent name raises DamagedCheckpoint."""
        row = self._row(name)
        return tuple(row["shape"]), _DTYPES[row["dtype"]]

    def metadata(self) -> dict[str, str]:
        """The header's free texts."""
        return dict(self._table.get("__metadata__") or {})

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; an absent name raises DamagedCheckpoint."""
        return tuple(self._row(name)["shape"])

    def _row(self, name: str) -> dict[str, Any]:
        row = self._table.get(name)
        if row is None:
            raise _damaged(self.path, f"it has no tensor '{name}'")
        return row

    def start(self, name: str, start: int = 0, stop: int | None = None, into: Tensor | None = None) -> Pending:
        """Begin to read elements `[start, stop)` of a flattened tensor.

        Args:
            into: contiguous memory of that dtype and size to read to, where that is possible; otherwise to new memory.

        Raises:
            DamagedCheckpoint: the name is absent or the tensor shorter.
        """
        row = self._row(name)
        dtype, (begin, end) = _DTYPES[row["dtype"]], row["data_offsets"]
        width = torch.empty(0, dtype=dtype).element_size()
        count = (end - begin) // width
        stop = count if stop is None else stop
        if not 0 <= start <= stop <= count:
            raise _damaged(self.path, f"'{name}' has {count} elements, [{start}, {stop}) are wanted")
        first, last = self._base + begin + start * width, self._base + begin + stop * width
        blocks = self.entry.covering(first, last) if self.verify else range(0)
        low, high = first, last
        if blocks:
            low, high = min(first, self.entry.bounds(blocks[0])[0]), max(last, self.entry.bounds(blocks[-1])[1])
        fits = into is not None and (low, high) == (first, last) and into.dtype == dtype and into.numel() == stop - start
        raw = into.view(-1).view(torch.uint8) if fits and into is not None else torch.empty(high - low, dtype=torch.uint8)
        view = raw.numpy().data if high > low else memoryview(b"")
        if high - low >= _HINT:  # the disk begins, whatever the threads are busy with
            os.posix_fadvise(self._fd, low, high - low, os.POSIX_FADV_WILLNEED)
        jobs = [(i, *self.entry.bounds(i)) for i in blocks] or ([(-1, low, high)] if high > low else [])
        futures = [self._pool.submit(self._fetch, i, view[a - low : b - low], a, name) for i, a, b in jobs]
        return Pending(futures, raw[first - low : last - low], dtype)

    def _fetch(self, index: int, target: memoryview, offset: int, name: str) -> None:
        digest = hashlib.sha256() if index >= 0 else None
        read_exactly(self.path, self._fd, offset, target, digest)
        if digest is not None:
            self._compare(index, digest.hexdigest(), f"'{name}'")

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        return self.start(name).wait().view(self.shape(name))


class Pending:
    """Elements that are on their way."""

    def __init__(self, futures: list[Future[None]], raw: Tensor, dtype: torch.dtype) -> None:
        self._futures, self._raw, self._dtype = futures, raw, dtype

    @property
    def size(self) -> int:
        """Bytes wanted."""
        return self._raw.numel()

    def wait(self) -> Tensor:
        """The flat tensor; damage that was found on the way is raised here."""
        for future in self._futures:
            future.result()
        return self._raw.view(self._dtype)


def damage_of(path: Path, entry: FileEntry) -> list[str]:
    """All that is wrong with one file, as lines that name tensors; empty when it is good. Reads the whole file."""
    try:
        fd = open_file(path, entry)
    except DamagedCheckpoint as error:
        return [f"{path.name}: {error.why if 'missing' not in error.what else 'missing'}"]
    try:
        with ThreadPoolExecutor(threads()) as pool:
            problems = list(pool.map(lambda i: _block_problem(path, fd, entry, i), range(len(entry.blocks))))
        names = _names_of_blocks(fd, entry) if not problems[0] else {}
    finally:
        os.close(fd)
    lines = []
    for index, problem in enumerate(problems):
        if problem:
            start, stop = entry.bounds(index)
            lines.append(
                f"{path.name}: {names.get(index, 'the header' if not index else 'data')} (bytes {start} to {stop}): {problem}"
            )
    return lines


def _block_problem(path: Path, fd: int, entry: FileEntry, index: int) -> str:
    start, stop = entry.bounds(index)
    digest = hashlib.sha256()
    try:
        read_exactly(path, fd, start, memoryview(bytearray(stop - start)), digest)
    except DamagedCheckpoint as error:
        return str(error.why)
    return mismatch(digest.hexdigest(), entry.blocks[index][1])


def _names_of_blocks(fd: int, entry: FileEntry) -> dict[int, str]:
    """Block number -> the tensor in it, of a file whose header is good; empty for a text file."""
    head = bytearray(entry.blocks[0][0])
    read_into(fd, 0, memoryview(head))
    try:
        table = parse_json(head[8:])
        rows = {name: row["data_offsets"] for name, row in table.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}
    found = {}
    for name, (begin, end) in rows.items():
        for index in entry.covering(len(head) + begin, len(head) + end):
            found[index] = f"'{name}'"
    return found
