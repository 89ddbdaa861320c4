"""The sweep runner as a user runs it: resumable after a kill, shared by two commands, clear about mistakes; its figures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron.config.load import load_config
from megatron.data_pipeline import DataPipeline
from megatron.errors import ConfigError
from megatron.settings import tokenizer_of
from megatron.synthetics.sweep import group, points_of, solved
from megatron.synthetics.sweep_results import Results, read_lines
from megatron.synthetics.train_point import Training, run_point
from tests.commands import run_here

ROOT = Path(__file__).resolve().parents[2]
SWEEP: dict[str, Any] = {
    "data": {
        "task": "mqar",
        "vocab_size": 32,
        "train": [{"length": 16, "pairs": 2, "examples": 64}],
        "test": [{"length": 16, "pairs": 2, "examples": 24}, {"length": 24, "pairs": 4, "examples": 16}],
    },
    "training": {"batch_size": 16, "epochs": 2, "learning_rate": [1e-3, 3e-3]},
    "families": [
        {"name": "based", "layers": ["base_conv", "based"], "hidden_size": 16, "based_feature_width": [4, 8]},
        {"name": "mamba", "layers": ["mamba", "mamba"], "hidden_size": 8},
    ],
}


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_here(f"tools/{name}.py", *arguments)


def written(folder: Path, sweep: dict[str, Any]) -> str:
    path = folder / "sweep.yml"
    path.write_text(json.dumps(sweep), encoding="utf-8")
    return str(path)


def test_the_grid() -> None:
    points = points_of(SWEEP)
    assert [p.name for p in points] == ["based"] * 4 + ["mamba"] * 2
    assert [p.training["learning_rate"] for p in points[:2]] == [1e-3, 3e-3], "rates of a model stand together"
    assert [p.model["layer_options"]["based"]["feature_width"] for p in points[:4]] == [4, 4, 8, 8]
    assert len({p.key() for p in points}) == 6 and len({group(p) for p in points}) == 3
    assert points[0].tags == {"learning_rate": 1e-3, "hidden_size": 16, "based_feature_width": 4}
    first = points[0].key()
    assert solved(points, {first: {"accuracy": 0.995}}) == {group(points[0])} and not solved(
        points, {first: {"accuracy": 0.98}}
    )


def test_a_point_is_a_function_of_its_parameters_and_learns() -> None:
    """A one-layer attention model learns to copy; stops when it has."""
    sweep = {
        "data": {
            "task": "memorization",
            "vocab_size": 9,
            "train": [{"length": 8, "examples": 64}],
            "test": [{"length": 8, "examples": 20}],
        },
        "training": {"batch_size": 16, "epochs": 60, "learning_rate": 3e-2},
        "families": [{"name": "conv", "layers": ["base_conv"], "hidden_size": 16}],
    }
    (point,) = points_of(sweep)
    line, again = run_point(point), run_point(point)
    assert line["accuracy"] >= 0.99 and line["steps"] < line["planned_steps"] == 240
    assert [line["history"], line["slices"]] == [again["history"], again["slices"]]
    assert line["state"] == {"base_conv": {"convolution": 2 * 32 * 2}} and line["state_bytes"] == 128
    assert line["processor_seconds"] > 0 and line["seconds"] > 0
    assert line["history"][-1]["accuracy"] == line["accuracy"] >= Training(learning_rate=1.0).early_stop


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"families": []}, "no families"),
        ({"family": []}, "no section 'family'"),
        ({"data": None}, "no data"),
        ({"families": [{"name": "x", "layers": ["based"], "hidden_size": 16, "based_width": 4}]}, "unknown 'based_width'"),
        ({"families": [{"name": "x", "layers": ["metalla"], "hidden_size": 16}]}, "unknown token mixer"),
        ({"families": [{"name": "x", "layers": ["metala"], "hidden_size": 15}]}, "family 'x'"),
        ({"families": [{"name": "x", "layers": ["metala"]}]}, "no hidden_size"),
    ],
)
def test_mistakes_in_a_sweep(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        points_of({**SWEEP, **change})
    assert message in str(caught.value)


def test_a_cut_line_is_no_result(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.jsonl")
    results.add({"key": "a", "accuracy": 0.5, "loss": float("nan")})
    with open(results.path, "a") as handle:
        handle.write('{"key": "b", "accur')
    assert set(results.read()) == {"a"} and results.read()["a"]["loss"] is None
    results.add({"key": "c", "accuracy": 0.25})
    assert [line["key"] for line in read_lines(results.path)] == ["a", "c"]
    with results.claim("a") as mine, results.claim("a") as second:
        assert mine and not second


def test_commands_say_what_is_wrong(tmp_path: Path) -> None:
    wrong = tool("synthetics", written(tmp_path, {**SWEEP, "famlies": []}))
    assert (
        wrong.returncode == 2 and "famlies" in wrong.stderr and "sweep.yml" in wrong.stderr and "Traceback" not in wrong.stderr
    )
    empty = tool("figures_recall", str(tmp_path / "none.jsonl"))
    assert empty.returncode == 3 and "no results" in empty.stderr and "Traceback" not in empty.stderr


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_is_drawn(tmp_path: Path) -> None:
    """Kill the command and its workers once the first result is there; the next command runs what is missing and no more."""
    sweep, output = written(tmp_path, SWEEP), tmp_path / "out.jsonl"
    command = [sys.executable, "tools/synthetics.py", sweep, "--output", str(output), "--workers", "2"]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    until = time.monotonic() + 60
    while not (output.is_file() and output.read_bytes().count(b"\n")):
        assert time.monotonic() < until and first.poll() is None
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    kept, whole = output.read_text().splitlines(), len(read_lines(output))
    command = [*command[:-1], "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # workers say what they do themselves
    assert done.returncode == 0, done.stderr
    lines = read_lines(output)
    assert sorted(line["key"] for line in lines) == sorted(p.key() for p in points_of(SWEEP)), "each point once"
    assert output.read_text().splitlines()[0] == kept[0] and whole < 6
    assert f"{whole} finished" in done.stdout and done.stdout.count("accuracy") == 6 - whole, "none of them was run again"
    assert not output.with_name("out.jsonl.claims").exists(), "locks go with the last open point"
    drawn = tool("figures_recall", str(output), "--output", str(tmp_path / "figure"))
    assert drawn.returncode == 0, drawn.stderr
    table = (tmp_path / "figure.md").read_text().splitlines()
    assert len(table) == 2 + 3 and table[0].endswith("| 16 tokens, 2 pairs | 24 tokens, 4 pairs | mean |")
    assert all((tmp_path / f"figure-{kind}.png").stat().st_size > 5_000 for kind in ("state", "slices"))


@pytest.mark.slow
def test_figures_of_sets(tmp_path: Path) -> None:
    """A panel for the shorter and one for the longer set in front; results of two tasks are not mixed."""
    lines = []
    for number, (name, accuracy) in enumerate((("based", 0.5), ("based", 0.25), ("jrt", 1.0))):
        sides = [{"first": 2, "second": 12, "accuracy": accuracy}, {"first": 12, "second": 2, "accuracy": 1.0}]
        line = {"key": str(number), "name": name, "data": {"task": "set_disjointness"}, "model": {"hidden_size": 32}}
        line |= {"training": {"learning_rate": 10.0**-number}, "tags": {"hidden_size": 32}, "slices": sides, "steps": 7}
        lines.append({**line, "accuracy": (accuracy + 1) / 2, "state_bytes": 1000, "parameters": 10})
    results = tmp_path / "sets.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    drawn = tool("figures_recall", str(results))
    assert drawn.returncode == 0, drawn.stderr
    rows = (tmp_path / "sets.md").read_text().splitlines()
    assert "| 2:12 | 12:2 |" in rows[0] and len(rows) == 2 + 2, "the better rate of each model"
    assert rows[2].endswith("| 1 | 7 | 50.0 | 100.0 | 75.0 |") and rows[3].endswith("| 0.01 | 7 | 100.0 | 100.0 | 100.0 |")
    assert (tmp_path / "sets-slices.png").stat().st_size > 5_000
    results.write_text(results.read_text() + json.dumps({**lines[0], "data": {"task": "mqar"}}) + "\n", encoding="utf-8")
    mixed = tool("figures_recall", str(results))
    assert mixed.returncode == 3 and "several tasks" in mixed.stderr


def test_one_source_of_data(tmp_path: Path) -> None:
    values = {"synthetic": SWEEP["data"], "data_path": "data/x", "num_layers": 1, "hidden_size": 8, "num_attention_heads": 1}
    values |= {"seq_length": 24, "train_iters": 1, "train_micro_batch_size_per_gpu": 1, "attention_config": ["metala"]}
    path = tmp_path / "two.yml"
    path.write_text(json.dumps(values), encoding="utf-8")
    run = load_config([path], world_size=1)
    tokenizer = tokenizer_of(run)
    assert tokenizer.vocab_size == 32 and tokenizer.name == "NumberTokenizer"
    with pytest.raises(ConfigError, match="synthetic and data_path are both given"):
        DataPipeline(run, tokenizer, 32).check()


@pytest.mark.slow
def test_a_training_run_on_a_synthetic_task(tmp_path: Path) -> None:
    """`train.py` with two slices of different lengths: accuracy in the metrics, resume bitwise."""
    config = {
        "synthetic": {
            "task": "mqar",
            "vocab_size": 32,
            "train": [{"length": 16, "pairs": 2, "examples": 256}, {"length": 24, "pairs": 4, "examples": 64}],
            "valid": [{"length": 16, "pairs": 2, "examples": 64}],
        },
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "seq_length": 24,
        "mlp_type": "none",
        "attention_config": ["base_conv", "metala"],
        "pos_emb": "none",
        "norm": "layernorm",
        "precision": "fp32",
        "optimizer": {"type": "Adam", "params": {"lr": 0.003}},
        "train_micro_batch_size_per_gpu": 16,
        "train_iters": 12,
        "eval_interval": 6,
        "eval_iters": 4,
        "log_interval": 1,
        "checkpoint_factor": 6,
        "hidden_dropout": 0,
        **{key: str(tmp_path / "run" / "checkpoints") for key in ("save", "load")},
        "run_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "mqar.yml"
    path.write_text(json.dumps(config), encoding="utf-8")

    def train(*settings: str) -> subprocess.CompletedProcess[str]:
        words = [word for setting in settings for word in ("--set", setting)]
        return run_here("train.py", path, *words)

    def losses(folder: str) -> list[float]:
        rows = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        assert any("validation/accuracy" in json.dumps(row) for row in rows)
        return [row["train/lm_loss"] for row in rows if "train/lm_loss_mean" in row]

    half = train("exit_interval=6")
    assert half.returncode == 0 and "accuracy: " in half.stdout, half.stderr
    whole = train()
    assert whole.returncode == 0, whole.stderr
    again = train(f"run_dir={tmp_path}/other", *(f"{key}={tmp_path}/other/checkpoints" for key in ("save", "load")))
    assert again.returncode == 0, again.stderr
    assert losses("run") == losses("other") and len(losses("run")) == 12
