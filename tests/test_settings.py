"""Settings of parts: the fields that are copied by name, and those that depend on several keys."""

from __future__ import annotations

import dataclasses
import functools
import typing
from pathlib import Path
from typing import Any

import pytest

from megatron.config import key_types
from megatron.config.schema import RunConfig, sections
from megatron.engine.base import EngineSettings
from megatron.engine.schedule import ScheduleConfig
from megatron.errors import ConfigError
from megatron.model.config import ModelConfig
from megatron.reliability.guard_options import GuardOptions
from megatron.settings import engine_settings, fill, masking, objective, shared_names
from megatron.training.options import FitOptions
from tests.arrival.case import BASE, Case, make_ground


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    return lambda changes: Case({**BASE, **changes}, tmp_path / "run.yml")


def _types(annotation: Any) -> set[Any]:
    """The alternatives of an annotation; choices count as the type of their words."""
    literal = {type(choice) for choice in key_types.choices(annotation)}
    return literal | {m for m in key_types.members(annotation) if typing.get_origin(m) is not typing.Literal}


@pytest.mark.parametrize("part", [ModelConfig, EngineSettings, FitOptions, GuardOptions, ScheduleConfig])
def test_a_field_that_is_copied_by_name_takes_every_value_of_its_key(part: type) -> None:
    names = shared_names(part)
    assert names
    for name in names.keys() - {"fp16", "objective"}:  # these two are given, see `engine_settings`
        cls = sections()[names[name]]
        derived = getattr(cls, name, None)
        getter = derived.fget if isinstance(derived, property) else getattr(derived, "func", None)
        key = typing.get_type_hints(getter)["return"] if getter else cls.model_fields[name].annotation
        taken = _types(typing.get_type_hints(part)[name])
        assert _types(key) <= taken | ({int} if float in taken else set()), name


def test_a_field_of_two_sections_is_refused_and_one_of_none_keeps_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass
    class Options:
        seed: int = 0
        unheard_of: int = 7

    assert fill(Options, RunConfig()) == Options(1234, 7)
    assert fill(Options, RunConfig(), seed=3) == Options(3, 7)
    monkeypatch.setattr(sections()["data"], "seed", functools.cached_property(lambda self: 1), raising=False)
    with pytest.raises(AssertionError, match="seed of Options is in training and data"):
        fill(Options, RunConfig())


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
