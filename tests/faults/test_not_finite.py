"""Weights that are not finite: never a checkpoint, never in the place of a good one, never a run that ends with code 0."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.commands import run_here
from tests.tiny_run import write_run

ROOT = Path(__file__).resolve().parents[2]


def run(config: Path, *extra: str) -> subprocess.CompletedProcess[str]:
    return run_here("train.py", config, *extra)


def spoilt(folder: Path, **changes: Any) -> Path:
    """A run whose rate is so high that the first applied step leaves the range of fp32."""
    how = {"train_iters": 6, "checkpoint_factor": 2, "run_dir": str(folder / "run"), "save": str(folder / "run" / "ck")}
    return write_run(folder, **{**how, "optimizer": {"type": "Adam", "params": {"lr": 1e38}}, "warmup": 0.0, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["stop", "rewind"])
def test_a_rate_beyond_all_bounds(tmp_path: Path, policy: str) -> None:
    ended = run(spoilt(tmp_path, on_skip_budget=policy))
    assert ended.returncode == 7, ended.stderr
    assert "step 2: weights or optimizer state are not finite: model." in ended.stderr and "Traceback" not in ended.stderr
    assert not list((tmp_path / "run" / "ck").glob("global_step*"))


@pytest.mark.slow
def test_without_a_place_to_save(tmp_path: Path) -> None:
    config = spoilt(tmp_path, checkpoint_factor=100_000, train_iters=3)
    values = json.loads(config.read_text())
    del values["save"]
    config.write_text(json.dumps(values))
    ended = run(config)
    assert ended.returncode == 7 and "not finite" in ended.stderr, ended.stdout + ended.stderr
