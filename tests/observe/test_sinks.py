"""TensorBoard and Weights & Biases with the real packages, and sinks that fail."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron.config.load import load_config
from megatron.observe.jsonl import read_rows
from megatron.observe.runfolder import RunFolder
from megatron.observe.sinks import SinkOptions, Sinks
from megatron.settings import sink_options
from tests.tiny_run import write_run


class Broken:
    """A sink whose disk is gone."""

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        raise OSError("no space left")

    def close(self) -> None:
        raise OSError("no space left")


class Kept:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.closed = False

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        self.rows.append((iteration, dict(values)))

    def close(self) -> None:
        self.closed = True


def test_a_broken_sink_is_reported_once_and_the_others_go_on() -> None:
    said: list[str] = []
    kept = Kept()
    sinks = Sinks({"broken": Broken(), "kept": kept}, said.append)
    for i in range(3):
        sinks.write(i, {"a": 1.0})
    sinks.close()
    assert len(kept.rows) == 3 and kept.closed
    assert len(said) == 1 and "broken" in said[0] and "no space left" in said[0] and "training continues" in said[0]


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said: list[str] = []
    sinks = Sinks.open(SinkOptions(tmp_path / "m.jsonl", tensorboard_dir=tmp_path / "tb"), said.append)
    assert list(sinks.names()) == ["metrics.jsonl"]
    assert len(said) == 1 and "TensorBoard" in said[0]
    sinks.write(1, {"a": 2.0})
    sinks.close()
    assert read_rows(tmp_path / "m.jsonl") == [{"iteration": 1, "a": 2.0}]


def test_tensorboard_events_are_readable(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for resume_from, steps in ((0, range(1, 6)), (3, range(4, 8))):
        sinks = Sinks.open(SinkOptions(tmp_path / "m.jsonl", resume_from, tensorboard_dir=tmp_path / "tb"))
        for step in steps:
            sinks.write(step, {"train/lm_loss": step + resume_from / 100, "bad": float("nan")})
        sinks.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert "bad" not in events.Tags()["scalars"]
    points = [(e.step, round(e.value, 2)) for e in events.Scalars("train/lm_loss")]
    assert points == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.03), (5, 5.03), (6, 6.03), (7, 7.03)]


def test_tensorboard_has_one_point_per_step(tmp_path: Path) -> None:
    """A validation comes with the numbers of its step, which were written before."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sinks = Sinks.open(SinkOptions(tmp_path / "m.jsonl", tensorboard_dir=tmp_path / "tb"))
    for step in (1, 2):
        sinks.write(step, {"train/lm_loss": step})
        sinks.write(step, {"train/lm_loss": step, "validation/lm_loss": 10 * step})
    sinks.write(3, {"train/lm_loss": 3, "validation/lm_loss": 30})  # a step that no log interval asked for
    sinks.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/lm_loss")] == [(1, 1), (2, 2), (3, 3)]
    assert [(e.step, e.value) for e in events.Scalars("validation/lm_loss")] == [(1, 10), (2, 20), (3, 30)]


_WANDB = """
import sys
from megatron.observe.sinks import SinkOptions, Sinks, WandbOptions
folder, resume = sys.argv[1], int(sys.argv[2])
options = WandbOptions(folder + "/wandb_logs", project="test", group="g", name="n", config={"lr": 0.5},
                       mode=sys.argv[3] or None)
sinks = Sinks.open(SinkOptions(folder + "/m.jsonl", resume, wandb=options))
assert "Weights & Biases" in sinks.names()
for step in range(resume + 1, resume + 4):
    sinks.write(step, {"train/lm_loss": 2.0 / step})
sinks.close()
"""


@pytest.mark.parametrize("mode", ["offline", "online", None])
def test_the_keys_of_wandb_arrive(mode: str | None, tmp_path: Path) -> None:
    values = {"use_wandb": True, "wandb_mode": mode, "wandb_project": "p", "wandb_group": "g", "wandb_team": "t"}
    values |= {"wandb_run_name": "n", "wandb_host": "https://here", "run_dir": str(tmp_path)}
    run = load_config([str(write_run(tmp_path, **values))], check=False)
    found = sink_options(run, RunFolder(tmp_path), 0).wandb
    assert found is not None
    assert (found.mode, found.project, found.group, found.team, found.name, found.host) == (
        mode,
        "p",
        "g",
        "t",
        "n",
        "https://here",
    )


@pytest.mark.slow
@pytest.mark.parametrize("by", ["variable", "key"])
def test_wandb_offline(by: str, tmp_path: Path) -> None:
    """As WANDB_MODE says, or the configuration, which needs no variable and no account."""
    pytest.importorskip("wandb")
    unset = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    for resume in (0, 3):
        done = subprocess.run(
            [sys.executable, "-c", _WANDB, str(tmp_path), str(resume), "offline" if by == "key" else ""],
            env={
                **unset,
                **({"WANDB_MODE": "offline"} if by == "variable" else {}),
                "PYTHONPATH": str(Path(__file__).parents[2]),
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stdout
    files = sorted((tmp_path / "wandb_logs" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    run_id = (tmp_path / "wandb_logs" / "wandb_run_id.txt").read_text()
    assert all(run_id in file.name for file in files)
    assert b"train/lm_loss" in files[0].read_bytes()
