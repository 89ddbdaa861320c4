"""Right answers on held-out data: counted right, the same on every mesh, and only outside training steps."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from megatron.engine.base import EngineSettings
from megatron.engine.schedule import learning_rate
from megatron.model.loss import token_loss
from megatron.model.objectives import Objective, objective_loss
from megatron.training.evaluate import Evaluation, Evaluator
from megatron.training.micro_batches import take_micro_batches
from tests.engine.engine_cases import CURVE, for_step, make_engine, micro_batches, model_config
from tests.parallel.ranks import run_ranks

SETTINGS = EngineSettings(gradient_accumulation=2, zero_stage=1)
MESHES = {"tp2": (1, 2, 2), "pp2": (2, 1, 2), "dp2": (1, 1, 2)}


def test_counting_by_hand() -> None:
    """Of four asked positions two are right; a training step and a prefix are not counted."""
    logits = torch.zeros(1, 6, 3)
    logits[0, torch.arange(6), torch.tensor([0, 1, 2, 0, 1, 2])] = 1.0
    labels, mask = torch.tensor([[0, 1, 0, 0, 0, 1]]), torch.tensor([[1.0, 0, 1, 1, 1, 0]])
    causal, prefix = Objective(count_answers=True), Objective("prefix", 3, count_answers=True)
    assert objective_loss(causal, logits, labels, mask, token_loss)[1] == {}, "gradients are on"
    with torch.no_grad():
        assert objective_loss(causal, logits, labels, mask, token_loss)[1] == {"right_answers": 2, "answers": 4}
        assert objective_loss(prefix, logits, labels, mask, token_loss)[1] == {"right_answers": 1, "answers": 2}
        assert objective_loss(Objective(), logits, labels, mask, token_loss)[1] == {}, "nobody asked"


def test_its_name_in_the_metrics() -> None:
    with_it, without = Evaluation("validation", 1.0, 2, 0.1, 0.75), Evaluation("test", 1.0, 2, 0.1)
    assert with_it.metrics()["validation/accuracy"] == 0.75 and "test/accuracy" not in without.metrics()


def job(pp: int, tp: int, kind: str) -> tuple[float | None, int]:
    """Six steps, then an evaluation: accuracy, and the answers of one more batch."""
    settings = replace(SETTINGS, objective=Objective(count_answers=True))
    engine = make_engine(pp, tp, kind, settings, model_config(tied=False))
    batches = micro_batches(engine.mesh)
    for step in range(6):
        engine.train_step(for_step(engine, batches), learning_rate(step, CURVE))
    found = Evaluator(engine, lambda: micro_batches(engine.mesh, start=1000), 3)()  # type: ignore[arg-type,return-value]
    assert found is not None
    return found.accuracy, engine.eval_loss(take_micro_batches(micro_batches(engine.mesh, start=1000), 1)).answers


@functools.cache
def alone() -> tuple[float | None, int]:
    accuracy, answers = run_ranks(job, 1, 1, 1, "single", connect=False)[0]
    return accuracy, answers


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_counts_the_same(mesh: str) -> None:
    """552 answers; fp32 sums of other orders may tip at most one of them over."""
    pp, tp, world = MESHES[mesh]
    accuracy, answers = alone()
    assert accuracy is not None and 0.02 < accuracy < 0.98
    for found, count in run_ranks(job, world, pp, tp, "deepspeed", timeout=120):
        assert found is not None and abs(found - accuracy) <= 1.01 / 552
        assert count == answers
