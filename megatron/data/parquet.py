"""Rows of a parquet file, read in a subprocess (`parquet_child.py`): damage that crashes the library becomes an error here."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from megatron.data.parquet_child import BATCH, END, ERROR, Fields
from megatron.errors import DataError

_ROOT = Path(__file__).resolve().parents[2]


def read_parquet(path: Path, keys: Sequence[str], skip: int = 0) -> Iterator[tuple[str, Fields]]:
    """Yield (`file:row`, the text of each key as bytes) for the rows from number `skip` on; null is empty, lists are joined.

    Raises:
        DataError: pyarrow is missing, a column is missing or holds no text, or the file is damaged.
    """
    command = [sys.executable, "-m", "megatron.data.parquet_child", str(path), str(skip), *keys]
    python_path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": python_path}
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        row = skip
        try:
            while (kind := process.stdout.read(1)) == BATCH:
                for fields in _batch(process.stdout, len(keys)):
                    yield f"{path}:row {row}", fields
                    row += 1
            if kind == ERROR:
                raise DataError(**json.loads(_exactly(process.stdout, *struct.unpack("<I", _exactly(process.stdout, 4)))))
            if kind != END:
                raise EOFError
        except (EOFError, ValueError, struct.error):
            process.kill()
            last_line = process.stderr.read().decode(errors="replace").strip().splitlines()[-1:]
            raise _died(path, row, process.wait(), *last_line) from None
        finally:
            process.kill()


def _batch(stream: IO[bytes], keys: int) -> list[Fields]:
    (rows,) = struct.unpack("<I", _exactly(stream, 4))
    lengths = struct.unpack(f"<{rows * keys}I", _exactly(stream, 4 * rows * keys))
    data, fields, at = _exactly(stream, sum(lengths)), [], 0
    for length in lengths:
        fields.append(data[at : at + length])
        at += length
    return [tuple(fields[i : i + keys]) for i in range(0, len(fields), keys)]


def _exactly(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise EOFError
    return data


def _died(path: Path, row: int, code: int, last_line: str = "") -> DataError:
    cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return DataError(
        "the parquet file cannot be read",
        where=f"{path}, after row {row}",
        why=f"the reading library ended ({cause}) {last_line}".strip(),
        hint="the file is damaged: copy or make it again",
    )
