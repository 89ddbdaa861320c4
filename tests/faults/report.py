"""Counts of the fault harnesses as one JSON file: each run replaces its own entry and leaves the others."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def as_typed(file: str) -> str:
    """The command line that this process was started with, for a script of this folder (its `__file__`)."""
    return " ".join(["python", f"tests/faults/{Path(file).name}", *sys.argv[1:]])


def store(file: Path | None, name: str, command: str, report: Mapping[str, Any]) -> None:
    """Put a report with its command under `name`; nothing without a file."""
    if file is None:
        return
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    known[name] = {"command": command, **report}
    file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
