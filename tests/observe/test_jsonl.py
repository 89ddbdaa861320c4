"""metrics.jsonl: each step once, whatever stops the run and wherever it resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.observe.jsonl import JsonLines, read_rows


def write(path: Path, steps: range, resume_from: int = 0) -> None:
    """Log `steps`, each with its number as the loss."""
    lines = JsonLines(path, resume_from)
    for step in steps:
        lines.write(step, {"train/lm_loss": float(step)})
    lines.close()


def test_numbers_are_not_rounded(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "deep" / "metrics.jsonl")
    lines.write(1, {"train/lm_loss": 1 / 3})
    assert read_rows(lines.path) == [{"iteration": 1, "train/lm_loss": 1 / 3}], "a row is there as soon as it is written"
    lines.close()


def test_later_numbers_of_a_step_join_its_row(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.write(1, {"a": 1.0})
    lines.write(2, {"a": 2.0})
    lines.write(2, {"b": 3.0, "a": 2.0})
    lines.write(2, {"c": 1e-300})
    lines.write(3, {"a": 4.0})
    lines.close()
    text = (tmp_path / "m.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == [
        {"iteration": 1, "a": 1.0},
        {"iteration": 2, "a": 2.0, "b": 3.0, "c": 1e-300},
        {"iteration": 3, "a": 4.0},
    ]


def test_resume_drops_what_is_run_again(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, range(1, 9))
    write(path, range(6, 11), resume_from=5)
    assert [row["iteration"] for row in read_rows(path)] == list(range(1, 11))


def test_resume_joins_the_row_it_starts_from(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, range(1, 5))
    lines = JsonLines(path, resume_from=4)
    lines.write(4, {"validation/lm_loss": 2.5})
    lines.close()
    assert read_rows(path)[-1] == {"iteration": 4, "train/lm_loss": 4.0, "validation/lm_loss": 2.5}
    assert len(read_rows(path)) == 4


def test_a_torn_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, range(1, 5))
    whole = path.read_bytes()
    for cut in (1, 5, 20):
        path.write_bytes(whole[:-cut] if cut > 1 else whole + b"\x00\xff{")
        assert len(read_rows(path)) == (4 if cut == 1 else 3)
    write(path, range(4, 6), resume_from=3)
    assert [row["iteration"] for row in read_rows(path)] == [1, 2, 3, 4, 5]


def test_a_new_training_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    write(path, range(1, 3))
    write(path, range(1, 2))
    assert len(read_rows(path)) == 1
    assert len(read_rows(tmp_path / "metrics.1.jsonl")) == 3
    assert len(read_rows(tmp_path / "metrics.2.jsonl")) == 2


def test_what_json_cannot_say_is_null(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.write(1, {"a": math.nan, "b": math.inf, "c": 1.0})
    lines.close()
    assert read_rows(tmp_path / "m.jsonl") == [{"iteration": 1, "a": None, "b": None, "c": 1.0}]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=6))
def test_any_history_of_stops_and_resumes(tmp_path_factory: pytest.TempPathFactory, history: list[tuple[int, int]]) -> None:
    path = tmp_path_factory.mktemp("m") / "m.jsonl"
    start = 0
    for length, back in history:
        write(path, range(start + 1, start + 1 + length), resume_from=start)
        end = start + length
        assert [row["iteration"] for row in read_rows(path)] == list(range(1, end + 1))
        start = max(0, end - back)


def test_absent_file_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "nothing.jsonl") == []
