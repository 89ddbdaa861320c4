"""The tests that are marked `gpu`, in as many processes as the machine has cores for: compiling takes most of their time."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from tools.bench.gpu_kit import ROOT
from tools.bench.gpu_kit_parts.part import Part

FILES = ("tests/ops", "tests/model/test_linear_loss.py", "tests/generation/test_decode.py")


def _pytest(part: Part) -> dict[str, Any]:
    few = ["tests/ops/test_rotary.py"]
    chosen = few if part.rehearse else [*FILES, "-m", "gpu", "-n", str(min(12, os.cpu_count() or 1)), "--timeout", "120"]
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short", "-rfE", *chosen]
    report = part.output / "pytest.txt"
    with report.open("w") as file:  # as it goes: a part that is ended in the middle has it too
        status = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    lines = report.read_text().splitlines()
    failed = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))]
    summary = next((line for line in reversed(lines) if " passed" in line or " failed" in line), "")
    return {"exit_code": status, "summary": summary, "failed": failed}


def run(part: Part) -> None:
    """One row."""
    part.row("gpu tests", lambda: _pytest(part))
