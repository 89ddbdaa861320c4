"""When to save: GPT-NeoX's rules."""

from __future__ import annotations

import pytest

from megatron.errors import ConfigError
from megatron.training.intervals import SaveRule, every, logarithmic_steps


def due(rule: SaveRule, last: int) -> list[int]:
    """Steps from 0 to `last` at which the rule saves."""
    return [i for i in range(last + 1) if rule.due(i)]


def test_linear() -> None:
    assert due(SaveRule(factor=4, train_iters=10), 10) == [4, 8]


def test_extra_steps_and_zero() -> None:
    assert due(SaveRule(factor=5, extra=(0, 1, 7), train_iters=10), 10) == [0, 1, 5, 7, 10]
    assert due(SaveRule(extra=(3,), train_iters=10), 10) == [3]


def test_log() -> None:
    assert due(SaveRule(factor=2, scale="log", train_iters=20), 20) == [1, 2, 4, 8, 16]
    assert due(SaveRule(factor=1.5, scale="log", train_iters=12), 12) == [1, 2, 3, 5, 7, 11]


@pytest.mark.parametrize("iters", [1, 7, 12, 100])
@pytest.mark.parametrize("factor", [None, 1, 3, 4, 200])
@pytest.mark.parametrize("scale", ["linear", "log"])
def test_saves_are_counted_without_going_through_the_steps(iters: int, factor: int | None, scale: str) -> None:
    if scale == "log" and factor == 1:
        factor = 2  # powers of 1 are no rule
    rule = SaveRule(factor=factor, scale=scale, extra=(0, 2, 6, 99, 500), train_iters=iters)
    assert rule.count() == len({step for step in due(rule, iters) if step} | {iters})
    assert SaveRule(factor=1, train_iters=10**15).count() == 10**15
    assert SaveRule(factor=1, train_iters=5, enabled=False).count() == 0


def test_never() -> None:
    assert due(SaveRule(factor=1, extra=(0,), train_iters=5, enabled=False), 5) == []


@pytest.mark.parametrize("keys", [{"factor": 1, "scale": "log"}, {"factor": 0}, {"factor": 1.5}, {"scale": "cubic"}])
def test_bad_rules(keys: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        SaveRule(train_iters=10, **keys)  # type: ignore[arg-type]


def test_every() -> None:
    assert [i for i in range(10) if every(3, i)] == [3, 6, 9]
    assert not any(every(value, i) for i in range(10) for value in (None, 0))


def test_the_last_power_may_be_the_last_step() -> None:
    assert logarithmic_steps(2, 8) == {1, 2, 4, 8}
    assert logarithmic_steps(2, 7) == {1, 2, 4}
