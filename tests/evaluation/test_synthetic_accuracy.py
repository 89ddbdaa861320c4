"""Accuracy of a checkpoint on its synthetic task: `train.py`, then `eval.py`, for each kind of task; lengths; mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.config.load import load_config
from megatron.errors import ConfigError, DataError
from megatron.evaluation.synthetic_accuracy import (
    accuracy_table,
    evaluated_slices,
    measure_slices,
    plot_accuracy,
    slice_names,
)
from megatron.layers.base import Context
from megatron.model.build import build_model
from megatron.model.config import ModelConfig
from megatron.synthetics.dataset import SyntheticDataset
from megatron.synthetics.number_tokenizer import NumberTokenizer
from tests.commands import run_here

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = NumberTokenizer(256)
PARITY: dict[str, Any] = {
    "task": "state_tracking",
    "group": "parity",
    "train": [{"length": 8, "examples": 64}],
    "test": [{"length": 8, "examples": 30}, {"length": 20, "examples": 12}],
}


def tiny(rows: int, learned: int = 0) -> Any:
    config = ModelConfig(rows, 8, 1, 1, 16, ("metala",), learned_positions=learned)
    return build_model(config).eval()


def test_the_numbers_of_a_slice() -> None:
    """Counted again from the logits of the complete model, one example at a time."""
    slices, model = evaluated_slices(PARITY, TOKENIZER), tiny(2)
    rows = measure_slices(model, slices, seed=5)
    assert [row["tokens"] for row in rows] == [8, 20] and [row["answers"] for row in rows] == [240, 240]
    for row, store in zip(rows, SyntheticDataset(slices, 5, "test").stores, strict=True):
        right, last, ones = 0, 0, 0
        for number in range(len(store)):
            example = store.rows(np.array([number]))
            with torch.no_grad():
                logits, *_ = model(torch.from_numpy(example.inputs), Context())
            guesses = logits[0].argmax(-1).numpy()
            right += int((guesses == example.labels[0]).sum())
            last += int(guesses[-1] == example.labels[0, -1])
            ones += int(example.labels.sum())
        assert row["accuracy"] == right / row["answers"] and row["last_accuracy"] == last / row["examples"]
        assert row["constant_answer"] == max(ones, row["answers"] - ones) / row["answers"] >= 0.5


def test_other_lengths_and_fewer_examples(tmp_path: Path) -> None:
    slices = evaluated_slices(PARITY, TOKENIZER, lengths=[4, 16], limit=20)
    assert [(part.task.seq_length, part.examples) for part in slices] == [(4, 20), (4, 12), (16, 20), (16, 12)]
    rows = measure_slices(tiny(2, learned=8), slices, 1)
    assert "error" in rows[2] and "accuracy" in rows[0] and "8" in rows[2]["error"]
    assert slice_names(rows) == ["length 4", "length 4", "length 16", "length 16"]
    assert slice_names(rows[:1]) == ["4 tokens"]
    table = accuracy_table(rows).splitlines()
    assert len(table) == 5 and table[0].split()[:4] == ["slice", "examples", "accuracy", "last"] and "learned" in table[3]
    image = plot_accuracy(measure_slices(tiny(2), slices, 1), tmp_path / "a.png", "parity", 8)
    assert image.stat().st_size > 5_000


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="no synthetic task"):
        evaluated_slices(None, TOKENIZER)
    digits = {"task": "pixels", "source": "digits", "test": [{}]}
    with pytest.raises(ConfigError, match="pixels has no lengths"):
        evaluated_slices(digits, TOKENIZER, lengths=[8])
    with pytest.raises(DataError, match="the task has 120 ids, the model 2"):
        measure_slices(tiny(2), evaluated_slices({**PARITY, "group": "s5"}, TOKENIZER), 1)


NAMES = ("listops-cpu", "text-cpu", "pixels-cpu", "pixels-two-way-cpu", "state-tracking-cpu")
FEWER = {
    "listops-cpu": {"train": [{"examples": 32}], "valid": [{"examples": 16}]},
    "text-cpu": {"length": 65, "train": [{}], "valid": [{"examples": 16}], "test": [{"examples": 24}]},
    "pixels-cpu": {"train": [{}], "valid": [{"examples": 16}], "test": [{"examples": 24}]},
    "pixels-two-way-cpu": {"train": [{}], "valid": [{"examples": 16}], "test": [{"examples": 24}]},
    "state-tracking-cpu": {"train": [{"examples": 32}], "valid": [{"examples": 16}]},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_train_then_eval(name: str, tmp_path: Path) -> None:
    """The configuration of the tree with fewer examples, steps and channels; the scores are those of the run's last test."""
    path = ROOT / "configs" / "synthetics" / f"{name}.yml"
    spec = dict(load_config([path], world_size=1).data.synthetic or {})
    for split in ("valid", "test"):
        spec.pop(split, None)
    words = [f"synthetic={json.dumps({**spec, **FEWER[name]}, default=list)}", "hidden_size=16", "intermediate_size=16"]
    words += ["train_iters=4", "train_micro_batch_size_per_gpu=8", "eval_interval=2", "eval_iters=2", "checkpoint_factor=4"]
    words += [f"run_dir={tmp_path}/run", *(f"{key}={tmp_path}/run/checkpoints" for key in ("save", "load"))]
    settings = [word for setting in words for word in ("--set", setting)]
    trained = run_here("train.py", path, *settings)
    assert trained.returncode == 0, trained.stderr + trained.stdout
    lengths = ["--eval_lengths", 8, 16] if name == "state-tracking-cpu" else []
    done = run_here("eval.py", path, *settings, "--eval_tasks", "synthetic", "--limit", 16, *lengths)
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(next((tmp_path / "run").glob("eval_synthetic_*.json")).read_text())
    assert [row["examples"] for row in found["rows"]] == [16] * max(1, len(lengths) - 1)
    assert len(list((tmp_path / "run").glob("eval_synthetic_*.png"))) == bool(lengths)
    if not lengths:
        metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        (test,) = [row["test/accuracy"] for row in metrics if "test/accuracy" in row]
        assert found["rows"][0]["accuracy"] == pytest.approx(test)
