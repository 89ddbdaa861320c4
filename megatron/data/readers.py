"""Finds the text in a user's inputs: JSON lines, plain text, parquet, compressed or not, folders, Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from megatron.data.hub import PREFIX, parse, read_hub
from megatron.data.parquet import read_parquet
from megatron.data.rows import Place, Row
from megatron.data.compressed import COMPRESSED, open_stream, skip_bytes
from megatron.errors import DataError
from megatron.files import sha256_of

_BOM = b"\xef\xbb\xbf"
_LINES, _TEXT, _PARQUET = "lines", "text", "parquet"
_KINDS = {".jsonl": _LINES, ".json": _LINES, ".ndjson": _LINES, ".txt": _TEXT, ".parquet": _PARQUET}
_LONGEST_ROW = 1 << 27  # bytes of one document in JSON; decoded, parsed and encoded it is held several times over
_LONGEST_TEXT = 1 << 30  # bytes of a text file, which is one document
READABLE = "jsonl, json, ndjson, txt (each also .gz, .zst), gz and zst (JSON lines), parquet"


def kind_of(path: Path) -> str | None:
    """How a file is read, by its name: lines, text, parquet; None if it is not."""
    packed = path.suffix in COMPRESSED
    inner = Path(path.stem).suffix if packed else path.suffix
    kind = _KINDS.get(inner, _LINES if packed and not inner else None)
    return None if packed and kind == _PARQUET else kind


def expand_inputs(inputs: Sequence[str]) -> list[str]:
    """The sources behind `inputs`: files, folders (all readable files in them, sorted, recursively), `hf:` datasets.

    Raises:
        DataError: no such path, a folder without readable files, or a kind of file that is not read.
    """
    sources: list[str] = []
    for name in inputs:
        path = Path(name)
        if name.startswith(PREFIX):
            parse(name)
            sources.append(name)
        elif path.is_dir():
            found = sorted(str(file) for file in path.rglob("*") if kind_of(file) and file.is_file())
            if not found:
                raise DataError("the folder holds no text", where=name, why=f"what is read: {READABLE}")
            sources += found
        elif not path.is_file():
            raise DataError("the input does not exist", where=name, why="neither a file nor a folder of that name")
        elif kind_of(path) is None:
            raise DataError(
                f"files of the kind {path.suffix or path.name!r} are not read",
                where=name,
                why=f"what is read: {READABLE}",
                hint="unpack or convert the file to JSON lines first",
            )
        else:
            sources.append(name)
    return sources


class RowReader:
    """The rows of all sources, in order; can start behind any row.

    Args:
        sources: from `expand_inputs`.
        keys: the fields wanted, for sources that have columns.
        start: the place of the last row that is done.

    Attributes:
        total_bytes: length of all files (datasets count 0).
    """

    def __init__(self, sources: Sequence[str], keys: Sequence[str] = ("text",), start: Place | None = None) -> None:
        self.sources, self.keys, self.start = list(sources), list(keys), start or Place()
        self._lengths = [0 if source.startswith(PREFIX) else Path(source).stat().st_size for source in sources]
        self.total_bytes = sum(self._lengths)
        self._done, self._raw = 0, None

    _raw: IO[bytes] | None

    @property
    def done_bytes(self) -> int:
        """Bytes of the files read so far, compressed as they are."""
        raw = self._raw
        return self._done + (raw.tell() if raw is not None and not raw.closed else 0)

    def identity(self) -> list[list[Any]]:
        """Name, length and time of change of every source: as long as it is the same, reading can go on at a place."""
        found: list[list[Any]] = []
        for source, length in zip(self.sources, self._lengths, strict=True):
            time = 0 if source.startswith(PREFIX) else Path(source).stat().st_mtime_ns
            found.append([source, length, time])
        return found

    def __iter__(self) -> Iterator[Row]:
        """Each row with the place behind it; a DataError where a file cannot be read."""
        for number, source in enumerate(self.sources):
            self._done = sum(self._lengths[:number])
            start = self.start if self.start.file == number else Place(number)
            if number >= self.start.file:
                yield from self._source(source, start)
        self._done, self._raw = self.total_bytes, None

    def _source(self, source: str, start: Place) -> Iterator[Row]:
        path = Path(source)
        if source.startswith(PREFIX):
            yield from self._columns(read_hub(source, self.keys, start.rows), start)
        elif kind_of(path) == _PARQUET:
            yield from self._columns(read_parquet(path, self.keys, start.rows), start)
        elif kind_of(path) == _LINES:
            yield from self._lines(path, start)
        elif start.rows == 0:
            with open_stream(path) as (stream, self._raw):
                data = stream.read(_LONGEST_TEXT)
                if len(data) == _LONGEST_TEXT:
                    hint = "divide it, or make JSON lines of it: a text file is one document"
                    raise DataError("the text is too long", where=source, why="it has 1 GiB or more", hint=hint)
                yield Row(source, data, False, Place(start.file, 1))

    def _columns(self, rows: Iterator[tuple[str, tuple[bytes, ...]]], start: Place) -> Iterator[Row]:
        for number, (where, fields) in enumerate(rows, start=start.rows + 1):
            yield Row(where, b"", False, Place(start.file, number), fields)

    def _lines(self, path: Path, start: Place) -> Iterator[Row]:
        """Blank lines are passed over; the offset counts every byte."""
        number, offset = start.rows, start.offset
        with open_stream(path) as (stream, self._raw):
            skip_bytes(stream, offset)
            while line := stream.readline(_LONGEST_ROW):
                number, offset = number + 1, offset + len(line)
                if len(line) == _LONGEST_ROW:
                    raise DataError("the line is too long", where=f"{path}:{number}", why="it has 128 MiB or more")
                if number == 1:
                    line = line.removeprefix(_BOM)
                if line.strip():
                    yield Row(f"{path}:{number}", line, True, Place(start.file, number, offset))


def check_sums(sources: Sequence[str], sums: Path) -> None:
    """Compare the files with a list made by `sha256sum`.

    Raises:
        DataError: a file is not in the list or differs from it; the list cannot be read.
    """
    try:
        pairs = [line.split(maxsplit=1) for line in sums.read_text("utf-8").splitlines() if line.strip()]
        known = {(sums.parent / name.lstrip("*")).resolve(): digest for digest, name in pairs}
    except (OSError, ValueError) as error:
        raise DataError("the list of checksums cannot be read", where=str(sums), why=str(error)) from None
    for source in sources:
        if source.startswith(PREFIX):
            continue
        digest = known.get(Path(source).resolve())
        if digest is None:
            raise DataError("the file is not in the list of checksums", where=source, why=f"the list is {sums}")
        if digest != sha256_of(source):
            raise DataError("the file is not the one in the list of checksums", where=source, why=f"the list is {sums}")
