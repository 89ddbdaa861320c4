"""Reads columns of text from one parquet file, in a subprocess: damaged files can crash pyarrow by a signal.

Run by `parquet.py` as `python -m megatron.data.parquet_child PATH SKIP KEY...`; writes batches of rows to standard output.
"""

from __future__ import annotations

import contextlib
import json
import resource
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from megatron.errors import DataError

_ROWS = 256
BATCH, ERROR, END = b"B", b"E", b"."
Fields = tuple[bytes, ...]


def serve(out: IO[bytes], path: Path, skip: int, keys: Sequence[str]) -> None:
    """Write frames: B, u32 rows, u32 length of every field, the fields; or E, u32 length, an error as JSON; a final dot."""
    try:
        for rows in read_batches(path, keys, skip):
            fields = [field for row in rows for field in row]
            out.write(BATCH + struct.pack(f"<I{len(fields)}I", len(rows), *map(len, fields)) + b"".join(fields))
        out.write(END)
    except DataError as error:
        message = json.dumps({"what": error.what, "where": error.where, "why": error.why, "hint": error.hint}).encode()
        out.write(ERROR + struct.pack("<I", len(message)) + message)
    out.flush()


def read_batches(path: Path, keys: Sequence[str], skip: int = 0) -> Iterator[list[Fields]]:
    """Yield the text of each key as bytes, for the rows from number `skip` on; null is empty, lists are joined by blank lines.

    Raises:
        DataError: pyarrow is missing, a column is missing or holds no text, or the file is damaged.
    """
    try:
        import pyarrow as pa
    except ImportError:
        hint = "pip install pyarrow (requirements: the extra `datasets`)"
        raise DataError("reading parquet needs the package pyarrow", where=str(path), hint=hint) from None
    import pyarrow.parquet  # before memory is limited

    with contextlib.suppress(OSError, ValueError):  # systems without /proc
        _limit_memory(path)
    at = 0
    try:
        file = _open(path)
        _check_columns(path, file.schema_arrow, keys)
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if at + rows <= skip:
                at += rows
                continue
            for batch in file.iter_batches(_ROWS, row_groups=[group], columns=list(keys), use_threads=False):
                batch.validate(full=False)
                yield _rows(batch, keys)[max(0, skip - at) :]
                at += batch.num_rows
        if at != file.metadata.num_rows:
            raise _damaged(path, f"it has {at} rows, its footer states {file.metadata.num_rows}")
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError) as error:
        raise _damaged(path, f"after row {at}: {error}" if at else str(error)) from None


def _open(path: Path) -> Any:
    """Open the file and compare the offsets in its footer with its length."""
    import pyarrow.parquet as pq

    length = path.stat().st_size
    limits = {"thrift_string_size_limit": max(length, 1024), "thrift_container_size_limit": max(length, 1024)}
    file = pq.ParquetFile(path, page_checksum_verification=True, memory_map=False, pre_buffer=False, **limits)
    for group in range(file.metadata.num_row_groups):
        for column in range(file.metadata.num_columns):
            chunk = file.metadata.row_group(group).column(column)
            first = chunk.data_page_offset if chunk.dictionary_page_offset is None else chunk.dictionary_page_offset
            if first < 0 or chunk.total_compressed_size < 0 or first + chunk.total_compressed_size > length:
                raise _damaged(path, f"column {column} of row group {group} is outside the file")
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


def _rows(batch: Any, keys: Sequence[str]) -> list[Fields]:
    return list(zip(*(_as_bytes(batch.column(key)) for key in keys), strict=True))


def _as_bytes(column: Any) -> list[bytes]:
    """The values undecoded, so that text that is not UTF-8 spoils one row, not the batch."""
    import pyarrow as pa
    import pyarrow.types as kinds

    lists = kinds.is_list(column.type) or kinds.is_large_list(column.type)
    column.validate(full=False)
    values = column.cast(pa.list_(pa.large_binary()) if lists else pa.large_binary()).to_pylist()
    if lists:
        return [b"\n\n".join(text or b"" for text in value or []) for value in values]
    return [value or b"" for value in values]


def _damaged(path: Path, why: str) -> DataError:
    return DataError("the parquet file is damaged", where=str(path), why=why, hint="copy or make it again")


def _limit_memory(path: Path) -> None:
    """Cap memory at the current use, 2 GiB and four times the file: a damaged length must not exhaust the machine."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + (2 << 30) + 4 * path.stat().st_size
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    serve(sys.stdout.buffer, Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
