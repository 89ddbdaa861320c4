"""Opens plain, gzip and Zstandard files as one stream of bytes, and says so when one ends too early."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron.errors import DataError

COMPRESSED = (".gz", ".zst")
_CHUNK = 1 << 18
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
        self._ready, self._rest = b"", b""

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`; 0 at the end. A DataError if the file is cut or damaged."""
        while not self._ready:
            data = self._rest or self._raw.read(_CHUNK)
            self._rest = b""
            if not data:
                if self._frame is not None:
                    raise DataError("the file is cut", where=self._where, why="its last Zstandard frame has no end")
                return 0
            self._ready = self._decompress(data)
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
            self._rest, self._frame = self._frame.unused_data, None
        return bytes(ready)


@contextmanager
def open_stream(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """(the decompressed bytes, the file itself, whose `tell()` is the progress); seeking forward works in both.

    Raises:
        DataError: cut, damaged or unreadable, whenever that is noticed.
    """
    try:
        with open(path, "rb") as raw:
            if path.suffix in COMPRESSED and path.stat().st_size == 0:
                raise DataError("the file is empty", where=str(path), why="even nothing has a header when it is compressed")
            if path.suffix == ".gz":
                with gzip.open(raw) as stream:
                    yield stream, raw  # type: ignore[misc]  # gzip's class is not an IO[bytes] to the type checker
            elif path.suffix == ".zst":
                yield io.BufferedReader(_ZstdStream(raw, str(path)), _CHUNK), raw
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
