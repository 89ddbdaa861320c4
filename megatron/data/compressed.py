"""Opens plain, gzip and Zstandard files as a byte stream, and reports truncated files and decompression bombs."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron.errors import DataError
from megatron.files import open_regular

COMPRESSED = (".gz", ".zst")
_CHUNK = 1 << 18
_STEP = 1 << 11  # compressed bytes per call of the decompressor: they expand to 64 MiB at most
_UNSUSPICIOUS = 1 << 26  # decompressed bytes that any file may have
_MAX_RATIO = 200  # maximum expansion; Python sources and logs expand 5 to 20 times
_LARGEST_WINDOW = 1 << 27  # bytes a Zstandard frame may ask for, as in the zstd command


class _ZstdStream(io.RawIOBase):
    """Concatenated frames. The library's own reader mistakes a truncated file for a short one."""

    def __init__(self, raw: IO[bytes], where: str) -> None:
        try:
            import zstandard
        except ImportError:
            raise DataError(
                "reading .zst files needs the package zstandard", where=where, hint="pip install zstandard"
            ) from None
        self._raw, self._where, self._error = raw, where, zstandard.ZstdError
        self._context = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        self._frame: Any = None
        self._ready, self._unread = memoryview(b""), b""

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`; 0 at the end. Raises a DataError if the file is truncated or damaged."""
        while not self._ready:
            data = self._unread or self._raw.read(_CHUNK)
            if not data:
                if self._frame is not None:
                    raise DataError("the file is cut", where=self._where, why="its last Zstandard frame has no end")
                return 0
            self._unread = data[_STEP:]
            self._ready = memoryview(self._decompress(data[:_STEP]))
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def _decompress(self, data: bytes) -> bytes:
        self._frame = self._frame or self._context.decompressobj()
        try:
            ready = self._frame.decompress(data)
        except self._error as error:
            raise DataError("the file cannot be decompressed", where=self._where, why=str(error)) from None
        if self._frame.eof:
            self._unread, self._frame = self._frame.unused_data + self._unread, None
        return bytes(ready)


class _Bounded(io.RawIOBase):
    """A decompressed stream that stops at a decompression bomb: text does not compress a thousandfold."""

    def __init__(self, stream: Any, raw: IO[bytes], where: str) -> None:
        self._stream, self._raw, self._where, self._produced = stream, raw, where, 0

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`; 0 at the end. Raises a DataError above the maximum expansion."""
        count = int(self._stream.readinto(buffer))
        self._produced += count
        if self._produced > max(_UNSUSPICIOUS, _MAX_RATIO * self._raw.tell()):
            raise DataError(
                "the file is not text: it expands too much when decompressed",
                where=self._where,
                why=f"{self._raw.tell():,} bytes became {self._produced:,}, more than {_MAX_RATIO} times as many",
                hint="unpack it and look at it first",
            )
        return count


@contextmanager
def open_stream(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Yield (the decompressed bytes, the file itself, whose `tell()` is the progress); both can seek forward.

    Raises:
        DataError: the file is truncated, damaged or unreadable; raised when the damage is reached.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as raw:
            if path.suffix in COMPRESSED and path.stat().st_size == 0:
                raise DataError("the file is empty", where=str(path), why="compressed files have a header even without content")
            if path.suffix == ".gz":
                with gzip.open(raw) as stream:
                    yield io.BufferedReader(_Bounded(stream, raw, str(path)), _CHUNK), raw
            elif path.suffix == ".zst":
                yield io.BufferedReader(_Bounded(_ZstdStream(raw, str(path)), raw, str(path)), _CHUNK), raw
            else:
                yield raw, raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError("the file is cut or damaged", where=str(path), why=str(error)) from None
    except OSError as error:
        raise DataError("the input cannot be read", where=str(path), why=error.strerror or str(error)) from None


def skip_bytes(stream: IO[bytes], count: int) -> None:
    """Skip `count` bytes, by seeking if possible."""
    if stream.seekable():
        stream.seek(count)
        return
    while count > 0:
        skipped = len(stream.read(min(count, _CHUNK)))
        if skipped == 0:
            return
        count -= skipped
