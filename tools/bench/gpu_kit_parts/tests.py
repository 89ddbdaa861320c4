"""The tests that are marked `gpu`, in as many processes as the machine has cores for: compiling takes most of their time."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from tools.bench.gpu_kit import ROOT
from tools.bench.gpu_kit_parts.part import Part

FILES = ("tests/ops", "tests/generation/test_decode.py")


def _pytest(part: Part) -> dict[str, Any]:
    few = ["tests/ops/test_rotary.py"]
    chosen = few if part.rehearse else [*FILES, "-m", "gpu", "-n", str(min(12, os.cpu_count() or 1)), "--timeout", "120"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *chosen]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = outcome.stdout.splitlines()
    (part.output / "pytest.txt").write_text(outcome.stdout[-400_000:] + outcome.stderr[-20_000:])
    failed = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"exit_code": outcome.returncode, "summary": lines[-1] if lines else "", "failed": failed}


def run(part: Part) -> None:
    """One row."""
    part.row("gpu tests", lambda: _pytest(part))
