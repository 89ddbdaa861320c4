"""Counts of the fault harnesses as one JSON file: each run replaces its own entry and leaves the others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def store(file: Path | None, name: str, command: str, report: Mapping[str, Any]) -> None:
    """Put a report with its command under `name`; nothing without a file."""
    if file is None:
        return
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    known[name] = {"command": command, **report}
    file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
