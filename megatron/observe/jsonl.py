"""`metrics.jsonl`: one JSON object per logged step, each step once, also after a resume.

A row is written as soon as the step is logged. Later metrics of the same step (its validation) rewrite that last row, in a
single write. A resume drops the rows after its first step, since those steps run again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.files import atomic_open, parse_json


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """All complete rows of a metrics file, without lines torn by a kill. An absent file has no rows."""
    return list(_rows(Path(path)))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as handle:
        for line in handle:
            try:
                row = parse_json(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("iteration"), int):
                yield row


def _plain(value: float) -> float | None:
    """The value, or None (JSON null) for NaN and infinity."""
    return value if math.isfinite(value) else None


def _set_aside(path: Path) -> None:
    """Rename the metrics of an earlier training in the same folder to `metrics.<n>.jsonl`."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    number = 1
    while (backup := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(backup)


class JsonLines:
    """Writes `metrics.jsonl`.

    Args:
        path: the file; created if absent.
        resume_from: step from which the run resumes. Later rows, repeated rows and torn lines are dropped;
            0 starts a new file and renames an older one.
    """

    def __init__(self, path: str | Path, resume_from: int = 0) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume_from == 0:
            _set_aside(self.path)
        rows = {row["iteration"]: row for row in _rows(self.path) if row["iteration"] <= resume_from}
        with atomic_open(self.path, "w") as handle:
            handle.writelines(json.dumps(row) + "\n" for row in rows.values())
        self._last: dict[str, Any] = list(rows.values())[-1] if rows else {}
        self._file = os.open(self.path, os.O_RDWR)
        self._end = os.lseek(self._file, 0, os.SEEK_END)
        self._begin = self._end - len(json.dumps(self._last)) - 1 if rows else self._end

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        """Add metrics of a step: a new row, or more fields of the last one.

        Raises:
            OSError: the disk is full or gone.
        """
        if self._last.get("iteration") != iteration:
            self._last, self._begin = {"iteration": iteration}, self._end
        self._last.update({name: _plain(value) for name, value in values.items()})
        line = (json.dumps(self._last) + "\n").encode()
        os.pwrite(self._file, line, self._begin)
        self._end = self._begin + len(line)
        os.ftruncate(self._file, self._end)

    def close(self) -> None:
        """Sync and close the file."""
        os.fsync(self._file)
        os.close(self._file)
