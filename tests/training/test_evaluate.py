"""An evaluation is the mean over its batches, read in parts, the same ones each time unless it is told to go on."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.engine.base import EvalResult
from megatron.training.evaluate import Evaluator


class _Engine:
    """Its batches are losses."""

    gradient_accumulation, mesh, device = 3, SimpleNamespace(pp=1), None

    def __init__(self) -> None:
        self.parts: list[int] = []

    def phase(self, name: str) -> None:
        """Nobody listens."""

    def eval_loss(self, micro_batches: Sequence[float]) -> EvalResult:
        count = len(micro_batches)
        self.parts.append(count)
        return EvalResult(sum(micro_batches) / count, right_answers=count - 2, answers=2 * count)


def _evaluator(engine: Any, **options: Any) -> Evaluator:
    return Evaluator(engine, lambda: iter([float(n * n) for n in range(100)]), 4, "validation", **options)


def test_the_loss_is_the_mean_over_all_batches_whatever_the_parts() -> None:
    engine = _Engine()
    found = _evaluator(engine)()
    assert found is not None and engine.parts == [8, 4] and found.batches == 12
    assert found.loss == pytest.approx(sum(n * n for n in range(12)) / 12)
    assert found.accuracy == (6 + 2) / 24


def test_the_batches_are_the_same_each_time_or_go_on() -> None:
    for fixed in (True, False):
        evaluate = _evaluator(_Engine(), fixed=fixed)
        first, second = evaluate(), evaluate()
        assert first is not None and second is not None
        assert (first.loss == second.loss) is fixed


def test_it_is_given_up_between_parts() -> None:
    asked = iter([False, True])
    engine = _Engine()
    assert _evaluator(engine, stop_asked=lambda: next(asked))() is None
    assert engine.parts == [8]
