"""Finds the text in a user's files: JSON lines, plain text, folders of both. Reading is cheap, so that decoding and parsing can
happen in the workers; each row carries its file and line, so that an error can name them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.errors import DataError

SUFFIXES = (".jsonl", ".txt")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """One undecoded document.

    Attributes:
        where: `file` or `file:line`.
        data: its bytes.
        is_json: a JSON record, else the text itself.
    """

    where: str
    data: bytes
    is_json: bool


def expand_inputs(inputs: Sequence[str]) -> list[Path]:
    """The files behind `inputs`: each a file or a folder, of which all readable files are taken, sorted, recursively.

    Raises:
        DataError: no such path, a folder without readable files, or a kind of file that is not read.
    """
    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
            if not found:
                raise DataError("the folder holds no text", where=name, why=f"no file ends in {' or '.join(SUFFIXES)}")
            files += found
        elif not path.is_file():
            raise DataError("the input does not exist", where=name, why="neither a file nor a folder of that name")
        elif path.suffix not in SUFFIXES:
            raise DataError(
                f"files of the kind {path.suffix or path.name!r} are not read",
                where=name,
                why=f"only {' and '.join(SUFFIXES)} are",
                hint="unpack or convert the file to JSON lines first",
            )
        else:
            files.append(path)
    return files


def read_rows(files: Sequence[Path]) -> Iterator[Row]:
    """The documents of `files` in order: each line of a `.jsonl` (blank lines passed over), each `.txt` as a whole."""
    for path in files:
        try:
            if path.suffix == ".jsonl":
                yield from _read_lines(path)
            else:
                yield Row(str(path), path.read_bytes(), is_json=False)
        except OSError as error:
            raise DataError("the input cannot be read", where=str(path), why=error.strerror) from None


def _read_lines(path: Path) -> Iterator[Row]:
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, start=1):
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                yield Row(f"{path}:{number}", line, is_json=True)


def row_texts(row: Row, keys: Sequence[str]) -> list[str]:
    """The text under each key; `""` where it is empty. A list of strings is joined by blank lines.

    A record that is a bare string, and a `.txt` file, are the text of the key `text`.

    Raises:
        DataError: not UTF-8, not JSON, a key is missing, or its value is not text; names file and line.
    """
    try:
        text = row.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            "the text is not UTF-8",
            where=row.where,
            why=f"byte {error.start} is 0x{row.data[error.start]:02x}",
            hint="convert it first, for example: iconv -f LATIN1 -t UTF-8",
        ) from None
    record = _parse(text, row.where) if row.is_json else text
    if isinstance(record, str):
        record = {"text": record}
    if not isinstance(record, dict):
        raise DataError("the row is not a record", where=row.where, why=f"it is a JSON {type(record).__name__}")
    return [_text_of(record, key, row.where) for key in keys]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError("the row is not JSON", where=where, why=str(error), hint="one JSON record per line") from None


def _text_of(record: dict[str, Any], key: str, where: str) -> str:
    if key not in record:
        raise DataError(
            f"the row has no field {key!r}",
            where=where,
            why=f"it has {', '.join(sorted(record)) or 'no field'}",
            hint="name the field with --jsonl-keys",
        )
    value = record[key]
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, str) for part in parts):
        raise DataError(f"field {key!r} is not text", where=where, why="it must be a string or a list of strings")
    text = "\n\n".join(parts)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"field {key!r} holds half a surrogate pair", where=where, why=f"character {error.start} cannot be UTF-8"
        ) from None
    return text
