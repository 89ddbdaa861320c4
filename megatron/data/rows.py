"""One undecoded document of the input, with its position: reading is cheap, decoding and parsing happen in the workers.

After a kill, reading resumes from the position of the last finished row; file and line of a row appear in errors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron.errors import DataError


class RowPosition(NamedTuple):
    """The position right after a row.

    Attributes:
        file: number of the input.
        rows: rows read from it.
        offset: decompressed bytes read from it (line-based inputs only).
    """

    file: int = 0
    rows: int = 0
    offset: int = 0


_START = RowPosition()


@dataclass(frozen=True)
class Row:
    """One undecoded document.

    Attributes:
        where: `file` or `file:line`, for errors.
        data: its bytes; empty if `fields` is given.
        is_json: `data` is a JSON record, else plain text.
        position: where reading resumes after it.
        fields: the text of each key, from columnar sources.
    """

    where: str
    data: bytes
    is_json: bool
    position: RowPosition = _START
    fields: tuple[bytes, ...] | None = None

    def __len__(self) -> int:
        """Bytes of input."""
        return len(self.data) if self.fields is None else sum(map(len, self.fields))


def row_texts(row: Row, keys: Sequence[str]) -> list[str]:
    """The text of each key; `""` if it is empty. A list of strings is joined by blank lines.

    A bare JSON string or a text file is the value of the key `text`.

    Raises:
        DataError: not UTF-8, not JSON, a key is missing, or its value is not text; names file and line.
    """
    if row.fields is not None:
        return [_decode(field, row.where) for field in row.fields]
    text = _decode(row.data, row.where)
    record = _parse(text, row.where) if row.is_json else text
    if isinstance(record, str):
        record = {"text": record}
    if not isinstance(record, dict):
        raise DataError("the row is not a record", where=row.where, why=f"it is a JSON {type(record).__name__}")
    return [_text_of(record, key, row.where) for key in keys]


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            "the text is not UTF-8",
            where=where,
            why=f"byte {error.start} is 0x{data[error.start]:02x}",
            hint="convert it first, for example: iconv -f LATIN1 -t UTF-8",
        ) from None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number of thousands of digits
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
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"field {key!r} is not text", where=where, why="it must be a string or a list of strings")
    joined = "\n\n".join(texts)
    try:
        joined.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"field {key!r} holds half a surrogate pair", where=where, why=f"character {error.start} cannot be UTF-8"
        ) from None
    return joined
