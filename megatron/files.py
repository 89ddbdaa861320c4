"""Atomic file writes, and safe reads of untrusted files.

Files that must survive a kill or a full disk (checkpoints, indexes, `latest`, JSON results) are written through this module:
to a temporary name, synced, renamed. JSON files are read through it: a pipe does not hang the reader, a huge file does not fill
memory, and input that Python accepts or crashes on (deep nesting, numbers of thousands of digits, lone surrogates) raises
a ValueError.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

LARGEST_JSON = 1 << 30  # bytes; manifests of thousands of ranks and tokenizers of a million entries are far smaller
_DEEPEST_JSON = 64  # levels; our files and Hugging Face's have less than ten
_LONGEST_NUMBER = 40  # digits; JSON of real programs has at most 20


def open_regular(path: str | Path) -> int:
    """Open a regular file for reading, following links; returns its descriptor.

    Raises:
        OSError: the file cannot be opened, or is a pipe (whose open would block), socket, device or folder.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_bytes(path: str | Path, limit: int = LARGEST_JSON) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: as `open_regular`, or the file is larger than `limit` bytes.
    """
    chunks, size = [], 0
    with os.fdopen(open_regular(path), "rb", buffering=0) as handle:
        while chunk := handle.read(1 << 20):  # in chunks: a single read would allocate `limit` bytes
            chunks.append(chunk)
            size += len(chunk)
            if size > limit:
                raise OSError(errno.EFBIG, f"larger than {limit:,} bytes", str(path))
    return b"".join(chunks)


def read_text(path: str | Path, limit: int = LARGEST_JSON) -> str:
    """The text of a regular UTF-8 file, with its original line ends.

    Raises:
        OSError: as in `read_bytes`.
        ValueError: the file is not UTF-8.
    """
    data = read_bytes(path, limit)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start} is 0x{data[error.start]:02x}") from None


def _number(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def parse_json(text: str | bytes | bytearray) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: not JSON, nested too deeply, an excessively long number, or a lone surrogate.
    """
    try:
        value = json.loads(text, parse_int=_number)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    level, depth = [value], 1
    while level := [child for item in level for child in _children(item) if isinstance(child, dict | list)]:
        depth += 1
        if depth > _DEEPEST_JSON:
            raise ValueError(f"it is nested deeper than {_DEEPEST_JSON} levels")
    if (b"\\ud" if isinstance(text, bytes | bytearray) else "\\ud") in text.lower():  # type: ignore[operator]
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half of a surrogate pair, which is not a character") from None
    return value


def _children(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def read_json(path: str | Path, limit: int = LARGEST_JSON) -> Any:
    """The value of a JSON file.

    Raises:
        OSError: as in `read_bytes`.
        ValueError: as in `parse_json`, or the file is not UTF-8.
    """
    return parse_json(read_text(path, limit))


def fsync_folder(folder: Path) -> None:
    """Sync a folder: only this makes a rename inside it durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_open(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary sibling file; on success it is synced and renamed to `path`, on an error it is removed."""
    path = Path(path)
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(fd, mode, encoding=None if "b" in mode else "utf-8") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
        fsync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8), atomically."""
    with atomic_open(path, "w") as handle:
        handle.write(text)


def write_json(path: str | Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def sha256_of(path: str | Path) -> str:
    """Hex SHA-256 of a regular file's content; raises OSError as `open_regular`."""
    digest = hashlib.sha256()  # hashlib.file_digest came with Python 3.11
    with os.fdopen(open_regular(path), "rb", buffering=0) as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
