"""The results of a sweep: JSON lines, appended one by one and synced, so that whatever ends a sweep costs the points that were
running and no others.

A point is claimed by a lock on a file beside the results: several workers of one command, or several commands, can work on the
same sweep, and a lock vanishes with the process that held it.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.errors import DataError
from megatron.files import parse_json, read_text


class Results:
    """The results of a sweep: one JSON object per line, in `path`; claims are lock files in `path` + `.claims`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._claims = path.with_name(path.name + ".claims")
        path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> dict[str, dict[str, Any]]:
        """Key -> line. A last line that was cut off by a kill is no result.

        Raises:
            DataError: another line is damaged.
        """
        return {line["key"]: line for line in read_lines(self.path)} if self.path.is_file() else {}

    def add(self, line: Mapping[str, Any]) -> None:
        """Append a line and wait until it is on the disk."""
        text = json.dumps(_finite(line), ensure_ascii=False) + "\n"
        with open(self.path, "a+b") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            size = handle.seek(0, os.SEEK_END)
            if size:  # a piece of a line that a kill has left is ended, so that the new one stands alone
                handle.seek(size - 1)
                text = text if handle.read(1) == b"\n" else "\n" + text
            handle.write(text.encode())
            handle.flush()
            os.fsync(handle.fileno())

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """True while the point is this worker's; False when another has it."""
        self._claims.mkdir(parents=True, exist_ok=True)
        with open(self._claims / key, "w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def finish(self) -> None:
        """Nothing is open any more: the lock files go."""
        shutil.rmtree(self._claims, ignore_errors=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The results in a file; pieces of lines (without an end, or followed by a whole line) are left out.

    Raises:
        DataError: a line holds something else than a result.
    """
    values = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        try:
            value = parse_json(line)
        except ValueError:
            continue  # cut off by a kill: the point is run again
        if not isinstance(value, dict) or "key" not in value or "accuracy" not in value:
            raise DataError("the file holds no results of a sweep", where=f"{path}:{number}")
        values.append(value)
    return values


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, ValueError) as error:
        raise DataError("the results cannot be read", where=str(path), why=str(error)) from None


def _finite(value: Any) -> Any:
    """JSON has no nan and no inf: they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
