"""Table and figure of sweeps over classification and state tracking: last accuracies, constant answers, refused files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.synthetics.sweep import points_of
from megatron.synthetics.sweep_results import Results
from megatron.synthetics.train_point import run_point
from tests.commands import run_here

BASE: dict[str, Any] = {
    "model": {"hidden_size": 8, "mlp": "gated"},
    "training": {"learning_rate": 1e-3, "batch_size": 8, "epochs": 1, "early_stop": 2.0},
    "families": [{"name": "metala", "layers": ["metala"]}, {"name": "attention", "layers": ["global"]}],
}
PARITY = {
    "task": "state_tracking",
    "group": "parity",
    "train": [{"length": 4, "examples": 16}],
    "test": [{"length": 4, "examples": 16}, {"length": 12, "examples": 16}],
}
LISTS = {"task": "listops", "length": 24, "min_length": 4, "train": [{"examples": 16}], "test": [{"examples": 40}]}


def results(path: Path, data: dict[str, Any], **training: Any) -> list[dict[str, Any]]:
    points = points_of({**BASE, "data": data, "training": {**BASE["training"], **training}})
    lines = [run_point(point) for point in points]
    for line in lines:
        Results(path).add(line)
    return lines


@pytest.mark.slow
def test_table_and_figure(tmp_path: Path) -> None:
    lines = results(tmp_path / "lists.jsonl", LISTS, epochs=3) + results(tmp_path / "parity.jsonl", PARITY)
    command = ["tools/figures_sequences.py", tmp_path / "lists.jsonl", tmp_path / "parity.jsonl"]
    done = run_here(*command, "--output", tmp_path / "out" / "all")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "all.json").read_text())["rows"]
    assert [(row["task"], row["model"], row["tokens"]) for row in rows] == [
        ("listops", "metala", 24),
        ("listops", "attention", 24),
        *(("parity", model, length) for model in ("metala", "attention") for length in (4, 12)),
    ]
    assert [row["accuracy"] for row in rows[:2]] == [line["final_accuracy"] for line in lines[:2]]
    assert [row["accuracy"] for row in rows[2:4]] == [part["accuracy"] for part in lines[2]["slices"]]
    assert all(0.1 <= row["constant_answer"] < 0.5 for row in rows[:2])
    assert all(0.5 <= row["constant_answer"] < 0.75 for row in rows[2:])
    assert rows[0]["recurrent_bytes"] == 4 * 8 * 8 // 2 and rows[1]["recurrent_bytes"] == 0
    table = (tmp_path / "out" / "all.md").read_text().splitlines()
    assert len(table) == 2 + 4 and "| 4 / 12 |" in table[-1] and (tmp_path / "out" / "all.png").stat().st_size > 5_000


def test_files_that_cannot_be_drawn(tmp_path: Path) -> None:
    def message(name: str) -> str:
        done = run_here("tools/figures_sequences.py", tmp_path / name, "--output", tmp_path / "x")
        assert done.returncode == 3 and "Traceback" not in done.stderr
        return done.stderr

    assert "there are no results" in message("none.jsonl")
    results(tmp_path / "mixed.jsonl", LISTS)
    results(tmp_path / "mixed.jsonl", PARITY)
    assert "several tasks" in message("mixed.jsonl")
    results(tmp_path / "often.jsonl", PARITY, epochs=2)
    assert "best step only" in message("often.jsonl")
