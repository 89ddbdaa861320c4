"""The GPU benchmark's whole way, once, on a CPU: every section runs, the result is judged and stored, the picture is drawn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the benchmark is about Triton kernels")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_check_runs_from_end_to_end(tmp_path: Path) -> None:
    target = tmp_path / "out" / "gpu.json"
    command = [sys.executable, "tools/bench/metala_gpu.py", "--check", "--output", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(target.read_text())
    assert result["left_out"] == [] and all(row["good"] for row in result["correctness"])
    for section in ("operator", "lonely sequences", "decode", "layer", "model"):
        assert result[section], section
    row = result["operator"][0]
    assert row["ours"]["forward_ms"] > 0 and row["floor backward"]["bytes_ms"] > row["floor forward"]["bytes_ms"]
    assert result["model"][0]["ours"]["tokens_per_s"] > 0 and result["model"][0]["token step"]["ours"]["graph_ms"] > 0
    assert target.with_suffix(".png").stat().st_size > 5000


@pytest.mark.slow
def test_without_a_gpu_it_says_what_to_do() -> None:
    command = [sys.executable, "tools/bench/metala_gpu.py"]
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment, timeout=100)
    assert done.returncode == 1 and "no CUDA device here" in done.stderr and "--check" in done.stderr
