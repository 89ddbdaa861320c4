"""What a run asks of its data beyond single keys: enough evaluation samples, and the place in a stream that was state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.data_pipeline import DataPipeline
from megatron.errors import DataError
from megatron.parallel.mesh import Mesh
from megatron.settings import tokenizer_of
from megatron.synthetics.stored import all_records, stored_split
from tests.arrival.case import BASE, Case, make_ground


@pytest.fixture
def data_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    make_ground(tmp_path)
    monkeypatch.chdir(tmp_path)

    def make(changes: dict[str, Any]) -> DataPipeline:
        run = Case({**BASE, "data_path": None, **changes}, tmp_path / "run.yml").run
        data = DataPipeline(run, tokenizer_of(run), 512)
        data.check()
        return data

    return make


def test_an_evaluation_of_a_synthetic_task_has_all_its_samples(data_pipeline: Any) -> None:
    slices = {"train": [{"examples": 40}], "test": [{"examples": 12}]}
    task = {"task": "mqar", "length": 24, "pairs": 2, "vocab_size": 32, **slices}
    data = data_pipeline({"synthetic": task, "eval_iters": 3, "gradient_accumulation_steps": 2})
    data.build({})
    assert [len(data.sets[name]) for name in ("valid", "test")] == [12, 12]
    assert len(list(data.evaluation("valid", Mesh.single()))) == 6


def test_a_resumed_run_refuses_a_changed_data_set(data_pipeline: Any) -> None:
    """Texts are read from a file of which the configuration knows the path alone."""
    path = Path("texts.jsonl")
    lines = [json.dumps({"text": f"text {i}", "label": i % 2}) for i in range(90)]
    path.write_text("\n".join(lines), encoding="utf-8")
    changes = {
        "synthetic": {"task": "text_bytes", "source": str(path), "length": 24, "train": [{}], "test": [{}]},
        "eval_iters": 0,
    }
    changes |= {"padded_vocab_size": None, "train_micro_batch_size_per_gpu": 4}
    first = data_pipeline(changes)
    first.build({})
    data_pipeline(changes).build(first.state())
    stored_split.cache_clear()
    all_records.cache_clear()
    path.write_text("\n".join([*lines, json.dumps({"text": "one more", "label": 1})]), encoding="utf-8")
    changed = data_pipeline(changes)
    with pytest.raises(DataError, match="data"):
        changed.build(first.state())
    path.unlink()
    stored_split.cache_clear()
    all_records.cache_clear()
    with pytest.raises(DataError, match="does not exist"):
        data_pipeline(changes)


def test_a_stream_goes_on_at_its_place_and_does_not_read_again_what_was_read(data_pipeline: Any) -> None:
    """The rows before the place may be gone by then."""
    stream = {"train_stream": ["text.jsonl"], "eval_iters": 0}
    first = data_pipeline(stream)
    first.build({})
    batches = first.training(Mesh.single(), 0, 0)
    for _ in range(4):
        next(batches)
    state, expected = first.state(), next(batches)
    text = Path("text.jsonl")
    rows = text.read_text().splitlines(keepends=True)
    done = state["stream"]["place"][1]
    assert done > 5
    text.write_text("".join("#" * (len(row) - 1) + "\n" for row in rows[: done - 1]) + "".join(rows[done - 1 :]))
    second = data_pipeline(stream)
    second.build(state)
    again = next(second.training(Mesh.single(), 8, 0))
    assert again.sample_ids == expected.sample_ids and bool((again.tokens == expected.tokens).all())
