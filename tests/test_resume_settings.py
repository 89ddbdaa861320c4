"""Going on: what changed is said, the learning rate is the one that the keys promise, a start from elsewhere happens once.

Whole commands on one process: what a person sees, and the rates that were used.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train
from megatron import assemble
from megatron.checkpoint.manifest import read_manifest
from megatron.config.load import load_config
from megatron.config.schema import RunConfig
from megatron.engine.schedule import ScheduleConfig, learning_rate
from megatron.errors import CheckpointError
from megatron.resume_settings import record, resumed
from tests.tiny_run import write_run

LINEAR = {"lr_decay_style": "linear", "warmup": 0.0, "min_lr": 0.0}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """(name, settings) -> what a tiny run says; its folder is `name`, its checkpoints are in `name/checkpoints`."""
    monkeypatch.setattr(assemble, "plot_metrics", lambda *_: "not drawn here")
    config = write_run(tmp_path / "data", **LINEAR)

    def start(name: str, **settings: Any) -> str:
        place = {
            "run_dir": str(tmp_path / name),
            "save": f"{tmp_path / name}/checkpoints",
            "load": f"{tmp_path / name}/checkpoints",
        }
        words = [word for key, value in {**place, **settings}.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        assert train.main([str(config), *words]) == 0
        return capsys.readouterr().out

    return start


def rates(folder: Path) -> dict[int, float]:
    """Step -> learning rate that was used."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["iteration"]: row["train/learning_rate"] for row in rows if "train/learning_rate" in row}


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("global_step*"))


def line(step: int, lr: float, horizon: int) -> float:
    """The rate of a linear schedule when `step` steps have been taken."""
    return learning_rate(step, ScheduleConfig(lr, horizon, warmup=0.0))


def test_a_schedule_is_the_checkpoints_or_the_configs_as_the_keys_say(run: Callable[..., str], tmp_path: Path) -> None:
    own = {"optimizer.params.lr": 0.001, "lr_decay_iters": 10}
    run("first", train_iters=2, **own)
    start = {"load": f"{tmp_path}/first/checkpoints", "train_iters": 4}
    with pytest.raises(CheckpointError, match="schedule is not that of the checkpoint") as caught:
        run("refused", **start, **{"optimizer.params.lr": 0.002, "lr_decay_iters": 20})
    assert "optimizer.params.lr 0.001 -> 0.002, lr_decay_iters 10 -> 20" in str(caught.value.why)
    assert "override_lr_scheduler" in str(caught.value.hint) and "use_checkpoint_lr_scheduler" in str(caught.value.hint)
    other = {"optimizer.params.lr": 0.002, "lr_decay_iters": 20}
    said = run("config", **start, **other, override_lr_scheduler=True)
    assert rates(tmp_path / "config") == {3: line(2, 0.002, 20), 4: line(3, 0.002, 20)}
    assert "warning: this run goes on from" in said and "next 0.0018 instead of 0.0008" in said
    said = run("saved", **start, **other, use_checkpoint_lr_scheduler=True)
    assert rates(tmp_path / "saved") == {3: line(2, 0.001, 10), 4: line(3, 0.001, 10)}
    assert "the checkpoint's schedule holds (optimizer.params.lr 0.001, not 0.002, lr_decay_iters 10, not 20)" in said
    # a second start keeps what the first one took over, not what the config said beside it
    run("saved", **{**start, "train_iters": 5}, **other, use_checkpoint_lr_scheduler=True)
    assert rates(tmp_path / "saved")[5] == line(4, 0.001, 10)
    same = run("same", **start, **own)
    assert rates(tmp_path / "same") == {3: line(2, 0.001, 10), 4: line(3, 0.001, 10)}
    assert (
        "train_iters: 2 -> 4" in same
        and "learning rate: " not in same.partition("with other settings")[2].split("samples/sec")[0]
    )


def test_finetune_starts_once(run: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run("first", train_iters=3)
    tune = {"load": f"{tmp_path}/first/checkpoints", "finetune": True}
    run("tuned", **tune, train_iters=2)
    assert f"starting from the weights of {tmp_path}/first/checkpoints/global_step3" in caplog.text
    assert steps(tmp_path / "tuned") == ["global_step2"] and set(rates(tmp_path / "tuned")) == {1, 2}
    said = run("tuned", **tune, train_iters=4)
    assert set(rates(tmp_path / "tuned")) == {1, 2, 3, 4}, "it started again instead of going on"
    assert "train_iters: 2 -> 4" in said
    assert f"going on from {tmp_path}/tuned/checkpoints/global_step2, which this run has saved since it started" in caplog.text
    manifest = read_manifest(tmp_path / "tuned" / "checkpoints" / "global_step4")
    assert manifest.optimizer and manifest.state["consumed_samples"] == 8
    run("tuned", **tune, train_iters=4)  # a finished run that a scheduler starts again
    assert set(rates(tmp_path / "tuned")) == {1, 2, 3, 4} and "global_step4" in steps(tmp_path / "tuned")


def test_finetune_in_its_own_folder_starts_once(run: Callable[..., str], tmp_path: Path) -> None:
    run("both", train_iters=3)
    run("both", train_iters=2, finetune=True)
    assert steps(tmp_path / "both") == ["global_step2", "global_step3"]
    run("both", train_iters=4, finetune=True)
    manifest = read_manifest(tmp_path / "both" / "checkpoints" / "global_step4")
    assert manifest.state["consumed_samples"] == 8 and manifest.facts["started_from"] == "."
    # what a run that started elsewhere saved can be the start of another finetuning
    run("next", train_iters=1, load=f"{tmp_path}/both/checkpoints", finetune=True)
    run("next", train_iters=2)
    run("next", train_iters=1, finetune=True)
    assert read_manifest(tmp_path / "next" / "checkpoints" / "global_step1").facts["started_from"] == "."


def test_a_branch_from_another_run_starts_once(run: Callable[..., str], tmp_path: Path) -> None:
    """Without finetune the step counts on, and a restart goes on in `save` all the same."""
    run("first", train_iters=2)
    branch = {"load": f"{tmp_path}/first/checkpoints", "iteration": 2}
    run("branch", **branch, train_iters=3)
    run("branch", **branch, train_iters=4)
    assert set(rates(tmp_path / "branch")) == {3, 4} and steps(tmp_path / "branch") == ["global_step3", "global_step4"]
    run("other", train_iters=1)
    with pytest.raises(CheckpointError, match="a run that started from another folder"):
        run("branch", load=f"{tmp_path}/other/checkpoints", finetune=True, train_iters=4)


def test_foreign_checkpoints_in_save_are_said_and_not_resumed(
    run: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run("first", train_iters=2)
    run("used", train_iters=3)
    run("used", train_iters=1, load=f"{tmp_path}/first/checkpoints", finetune=True)
    assert "holds global_step3 of another run" in caplog.text
    assert read_manifest(tmp_path / "used" / "checkpoints" / "global_step1").state["consumed_samples"] == 2


CHANGED = {
    "seed": ({"seed": 99}, "seed: 1234 -> 99; the order of the data is another one"),
    "seq_length": ({"seq_length": 16}, "seq_length: 32 -> 16; a sample is of another length"),
    "batch": ({"train_micro_batch_size_per_gpu": 4}, "train_batch_size: 2 -> 4; a step reads another number of samples"),
    "length": ({"train_iters": 20}, "train_iters: 10 -> 20; the run ends at another step"),
    "length and rate": ({"train_iters": 20}, "learning rate: lr_decay_iters 10 -> 20: next 0.00255 instead of 0.0021"),
    "share": ({"train_iters": 20, "lr_decay_fraction": 0.2}, ""),
    "decay": ({"weight_decay": 0.0}, "weight_decay: 0.1 -> 0"),
    "betas": ({"optimizer.params.betas": [0.9, 0.95]}, "optimizer.params.betas: [0.9, 0.999] -> [0.9, 0.95]"),
    "precision": ({"precision": "bfloat16"}, "precision: fp32 -> bfloat16"),
    "loss": ({"eod_mask_loss": True}, "eod_mask_loss: False -> True; the loss is another one"),
    "nothing": ({"log_interval": 7, "run_dir": "elsewhere"}, None),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    path = write_run(tmp_path_factory.mktemp("config"), train_iters=10, **LINEAR)
    return lambda **changes: load_config([path], world_size=1, overrides=changes)


@pytest.mark.parametrize("name", CHANGED)
def test_every_change_is_said_with_what_it_does(name: str, config: Callable[..., RunConfig]) -> None:
    changes, text = CHANGED[name]
    facts = {"settings": json.loads(json.dumps(record(config())))}
    if text == "":
        with pytest.raises(CheckpointError):
            resumed(config(**changes), facts, 3, "global_step3")
        return
    lines = resumed(config(**changes), facts, 3, "global_step3").lines
    assert lines[:1] == (("warning: this run goes on from global_step3 with other settings:",) if text else ())
    assert text is None or any(text in line for line in lines[1:]), lines


def test_an_older_checkpoint_says_what_it_knows(config: Callable[..., RunConfig]) -> None:
    facts = {"seq_length": 64, "run": {"seed": 5, "global batch": 2, "learning rate": 0.1, "precision": "fp32"}}
    lines = resumed(config(**{"optimizer.params.lr": 0.5}), facts, 3, "x").lines
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["seed", "seq_length"]
    lines = resumed(config(use_checkpoint_lr_scheduler=True), {}, 3, "x").lines
    assert "does not say its schedule" in lines[1]
    for broken in (
        {"settings": 3, "run": []},
        {"settings": {"values": {}, "schedule": {"lr": "x"}}},
        {"settings": {"values": 1}},
    ):
        assert resumed(config(), broken, 3, "x").lines == ()


def test_a_constant_rate_has_no_end(config: Callable[..., RunConfig]) -> None:
    facts = {"settings": record(config(lr_decay_style="constant", lr_decay_iters=10))}
    changes = {"lr_decay_style": "constant", "lr_decay_iters": 50, "min_lr": 1e-5}
    assert resumed(config(**changes), facts, 3, "x").lines == ()
