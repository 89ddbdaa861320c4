"""What settings make of several keys at once: batches, the prefix of an objective, the mask token, which split is which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.errors import ConfigError
from megatron.settings import engine_settings, masking, objective
from tests.arrival.case import BASE, Case, make_ground


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    return lambda changes: Case({**BASE, **changes}, tmp_path / "run.yml")


def test_the_micro_batch_is_not_the_global_one(case: Any) -> None:
    settings = engine_settings(case({"gradient_accumulation_steps": 3}).run)
    assert (settings.micro_batch, settings.gradient_accumulation) == (2, 3)


def test_the_prefix_of_the_objective_is_that_of_the_layers(case: Any) -> None:
    layers = {"attention_config": [[["jrt"], "all"]], "jrt_prefix_length": 8, "objective": "jrt"}
    assert objective(case(layers).run).prefix_length == 8
    assert objective(case({"objective": "prefix", "objective_prefix_length": 6}).run).prefix_length == 6
    with pytest.raises(ConfigError, match="objective_prefix_length 6 is not jrt_prefix_length 8"):
        objective(case({**layers, "objective_prefix_length": 6}).run)
    with pytest.raises(ConfigError, match="objective causal with jrt layers"):
        objective(case({**layers, "objective": "causal"}).run)
    with pytest.raises(ConfigError, match="leaves nothing of seq_length"):
        objective(case({"objective": "prefix", "objective_prefix_length": 24}).run)


def test_the_mask_token_is_the_last_row_unless_it_is_said(case: Any) -> None:
    run = case({"objective": "jrt", "objective_prefix_length": 8}).run
    hiding = masking(run, 512)
    assert hiding is not None and hiding.mask_token == 511
    assert masking(case({}).run, 512) is None
    with pytest.raises(ConfigError, match="outside the vocabulary"):
        masking(case({"objective": "jrt", "objective_prefix_length": 8, "objective_mask_token": 512}).run, 512)


def test_validation_and_test_read_their_own_splits(case: Any, tmp_path: Path) -> None:
    make_ground(tmp_path)
    lists = {f"{name}_data_paths": [corpus] for name, corpus in (("train", "corpus"), ("valid", "second"), ("test", "third"))}
    started = case({"data_path": None, **lists})
    for action, split, corpus in (("validate", "validation", "second"), ("test", "test", "third")):
        evaluator = getattr(started.fit["actions"], action)
        assert evaluator.split == split
        batches = evaluator.open_batches().gi_frame.f_locals["self"]
        assert batches.dataset.datasets[0].indexed.prefix == corpus
