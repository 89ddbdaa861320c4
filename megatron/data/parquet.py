"""Reads columns of text from parquet files, and does not trust them: what the library would choke on is an error with a place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron.errors import DataError

_ROWS = 256


def read_parquet(path: Path, keys: Sequence[str], skip: int = 0) -> Iterator[tuple[str, tuple[bytes, ...]]]:
    """(`file:row`, the text of each key as bytes) for the rows from number `skip` on; null is empty, lists are joined by blank lines.

    Raises:
        DataError: pyarrow is missing, a column is missing or holds no text, or the file is damaged.
    """
    try:
        import pyarrow as pa
    except ImportError:
        hint = "pip install pyarrow (requirements: the extra `datasets`)"
        raise DataError("reading parquet needs the package pyarrow", where=str(path), hint=hint) from None
    at = 0
    try:
        file = _open(path)
        _check_columns(path, file.schema_arrow, keys)
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if at + rows <= skip:
                at += rows
                continue
            for batch in file.iter_batches(_ROWS, row_groups=[group], columns=list(keys)):
                batch.validate(full=False)
                yield from _rows(path, batch, keys, at, skip)
                at += batch.num_rows
        if at != file.metadata.num_rows:
            raise _damaged(path, f"{at} rows were found and {file.metadata.num_rows} promised")
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError) as error:
        raise _damaged(path, f"behind row {at}: {error}" if at else str(error)) from None


def _open(path: Path) -> Any:
    """The file, after comparing what its footer promises with its length."""
    import pyarrow.parquet as pq

    length = path.stat().st_size
    limits = {"thrift_string_size_limit": max(length, 1024), "thrift_container_size_limit": max(length, 1024)}
    file = pq.ParquetFile(path, page_checksum_verification=True, memory_map=False, pre_buffer=False, **limits)
    for group in range(file.metadata.num_row_groups):
        for column in range(file.metadata.num_columns):
            chunk = file.metadata.row_group(group).column(column)
            first = chunk.data_page_offset if chunk.dictionary_page_offset is None else chunk.dictionary_page_offset
            if first < 0 or chunk.total_compressed_size < 0 or first + chunk.total_compressed_size > length:
                raise _damaged(path, f"column {column} of row group {group} lies outside the file")
    return file


def _check_columns(path: Path, schema: Any, keys: Sequence[str]) -> None:
    import pyarrow.types as kinds

    for key in keys:
        if schema.get_field_index(key) < 0:
            raise DataError(
                f"the file has no column {key!r}",
                where=str(path),
                why=f"it has {', '.join(schema.names)}",
                hint="name the column with --jsonl-keys",
            )
        kind = schema.field(key).type
        inner = kind.value_type if kinds.is_list(kind) or kinds.is_large_list(kind) else kind
        if not (kinds.is_string(inner) or kinds.is_large_string(inner) or kinds.is_null(inner)):
            raise DataError(f"column {key!r} is not text", where=str(path), why=f"it is {kind}")


def _rows(path: Path, batch: Any, keys: Sequence[str], at: int, skip: int) -> Iterator[tuple[str, tuple[bytes, ...]]]:
    columns = [_as_bytes(batch.column(key)) for key in keys]
    for number, fields in enumerate(zip(*columns, strict=True), start=at):
        if number >= skip:
            yield f"{path}:row {number}", fields


def _as_bytes(column: Any) -> list[bytes]:
    """The values undecoded: text that is not UTF-8 is then the fault of one row, not of the batch."""
    import pyarrow as pa
    import pyarrow.types as kinds

    lists = kinds.is_list(column.type) or kinds.is_large_list(column.type)
    column.validate(full=False)
    values = column.cast(pa.list_(pa.large_binary()) if lists else pa.large_binary()).to_pylist()
    if lists:
        return [b"\n\n".join(part or b"" for part in value or []) for value in values]
    return [value or b"" for value in values]


def _damaged(path: Path, why: str) -> DataError:
    return DataError("the parquet file is damaged", where=str(path), why=why, hint="copy or make it again")
