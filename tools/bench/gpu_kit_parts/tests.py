"""The tests that are marked `gpu`, in as many processes as the machine has cores for: compiling takes most of their time.

A row per test, stored as it ends: a part that is ended in the middle has the tracebacks so far, and the next one goes on.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from tools.bench.gpu_kit import ROOT, stored
from tools.bench.gpu_kit_parts.part import Part

# whole models first: they need every kernel
FILES = ("tests/generation/test_decode.py", "tests/model/test_linear_loss.py", "tests/ops")
_REHEARSED = ("tests/ops/test_rotary.py", "-p", "no:xdist")


class _Rows:
    """A plugin of pytest that stores each outcome."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A row when a test has run, or when it failed before or after that."""
        if report.failed:
            self.part.row(report.nodeid, lambda: {"error": report.longreprtext[-1500:], "seconds": round(report.duration, 2)})
        elif report.when == "call":
            self.part.row(report.nodeid, lambda: {"outcome": report.outcome, "seconds": round(report.duration, 2)})


def _pytest(part: Part, arguments: list[str]) -> dict[str, Any]:
    os.chdir(ROOT)
    status = pytest.main([*arguments, "-p", "no:cacheprovider", "--tb=short"], plugins=[_Rows(part)])
    outcomes = [row for row in stored(part.output / f"{part.name}.jsonl") if "seconds" in row]
    return {"exit_code": int(status), "passed": sum(row.get("outcome") == "passed" for row in outcomes)}


def run(part: Part) -> None:
    """A row per test that has none yet, and one of all."""
    past = [f"--deselect={row['key']}" for row in stored(part.output / f"{part.name}.jsonl")]
    several = [*FILES, "-m", "gpu", "-n", str(min(12, os.cpu_count() or 1))]
    part.row("gpu tests", _pytest, part, [*(_REHEARSED if part.rehearse else several), *past])
