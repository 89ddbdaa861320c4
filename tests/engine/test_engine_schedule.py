"""The learning rate against curves that the official code printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.engine.schedule import ScheduleConfig, decay_horizon, learning_rate
from megatron.errors import ConfigError


def curve(keys: dict[str, Any]) -> ScheduleConfig:
    horizon = decay_horizon(keys["train_iters"], keys["lr_decay_iters"], keys["lr_decay_fraction"])
    return ScheduleConfig(keys["lr"], horizon, keys["lr_decay_style"], keys["warmup"], keys["min_lr"])


def test_golden_curves(golden_neox: Path) -> None:
    cases = json.loads((golden_neox / "lr" / "manifest.json").read_text())["cases"]
    assert len(cases) == 32
    with np.load(golden_neox / "lr" / "lr_values.npz") as values:
        for case in cases:
            config = curve(case["config"])
            assert config.horizon == case["end_iter"]
            assert config.warmup_steps == pytest.approx(case["warmup_iter"], abs=1e-12)
            want = values[case["id"]][: config.horizon + 1]
            got = [learning_rate(n, config) for n in range(len(want))]
            assert np.abs(np.array(got) - want).max() <= 1e-12, case["id"]


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "exponential"])
def test_after_the_horizon_the_rate_stays(style: str) -> None:
    """Documented difference: the official cosine rises again there."""
    config = ScheduleConfig(1e-3, 100, style, 0.1, 1e-5)
    assert {learning_rate(n, config) for n in (100, 101, 150, 10_000)} == {learning_rate(100, config)}


def test_first_step_is_not_zero_and_warm_up_may_be_absent() -> None:
    assert learning_rate(0, ScheduleConfig(1e-3, 100, warmup=0.1)) == pytest.approx(1e-4)
    assert learning_rate(0, ScheduleConfig(1e-3, 100, warmup=0.0)) == pytest.approx(1e-3)


@pytest.mark.parametrize("bad", [{"style": "wsd"}, {"min_lr": 1.0}, {"warmup": -0.1}])
def test_nonsense_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ScheduleConfig(**{"lr": 1e-3, "horizon": 10, **bad})


def test_a_warmup_shorter_than_a_step_never_exceeds_the_peak() -> None:
    """NeoX's formula gives lr / w at step 0: a hundred times the peak for a three-step run with the default warm-up."""
    config = ScheduleConfig(1e-3, horizon=3, style="constant", warmup=0.01)
    assert [learning_rate(n, config) for n in range(4)] == [1e-3] * 4


def test_the_horizon_is_decay_iters_else_a_share_of_the_steps() -> None:
    assert [decay_horizon(*given) for given in ((100,), (100, 7), (100, 7, 0.5), (99, None, 0.5), (3, None, 0.1))] == [
        100,
        7,
        7,
        49,
        1,
    ]
