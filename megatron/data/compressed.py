"""Opens plain, gzip and Zstandard files as one stream of bytes, and says so when one ends too early."""

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
_PIECE = 1 << 11  # compressed bytes handed on at once: no more than 64 MiB can come of them
_UNSUSPICIOUS = 1 << 26  # bytes that may come of any file
_MOST_TO_ONE = 200  # the most that a file may grow; Python sources and logs grow 5 to 20 times
_LARGEST_WINDOW = 1 << 27  # bytes a Zstandard frame may ask for, as in the zstd command


class _ZstdStream(io.RawIOBase):
    """Frames one after the other. The library's own reader takes a cut file for a short one."""

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
        self._ready, self._rest = memoryview(b""), b""

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`; 0 at the end. A DataError if the file is cut or damaged."""
        while not self._ready:
            data = self._rest or self._raw.read(_CHUNK)
            if not data:
                if self._frame is not None:
                    raise DataError("the file is cut", where=self._where, why="its last Zstandard frame has no end")
                return 0
            self._rest = data[_PIECE:]
            self._ready = memoryview(self._decompress(data[:_PIECE]))
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
            self._rest, self._frame = self._frame.unused_data + self._rest, None
        return bytes(ready)


class _Bounded(io.RawIOBase):
    """A decompressed stream that is given up when it is a bomb: text does not shrink to a thousandth."""

    def __init__(self, stream: Any, raw: IO[bytes], where: str) -> None:
        self._stream, self._raw, self._where, self._given = stream, raw, where, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`; 0 at the end. A DataError when far more came out than went in."""
        count = int(self._stream.readinto(buffer))
        self._given += count
        if self._given > max(_UNSUSPICIOUS, _MOST_TO_ONE * self._raw.tell()):
            raise DataError(
                "the file is no text: it grows too much when it is decompressed",
                where=self._where,
                why=f"{self._raw.tell():,} bytes have become {self._given:,}, more than {_MOST_TO_ONE} times as many",
                hint="unpack it and look at it first",
            )
        return count


@contextmanager
def open_stream(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """(the decompressed bytes, the file itself, whose `tell()` is the progress); seeking forward works in both.

    Raises:
        DataError: cut, damaged or unreadable, whenever that is noticed.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as raw:
            if path.suffix in COMPRESSED and path.stat().st_size == 0:
                raise DataError("the file is empty", where=str(path), why="even nothing has a header when it is compressed")
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
    """Pass over `count` bytes, by seeking where that is possible."""
    if stream.seekable():
        stream.seek(count)
        return
    while count > 0:
        got = len(stream.read(min(count, _CHUNK)))
        if got == 0:
            return
        count -= got
