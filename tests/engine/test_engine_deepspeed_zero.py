"""ZeRO-2 and ZeRO-3 without a pipeline: equal to one process, alone and beside tensor parallelism; refused with a pipeline."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from megatron.engine.base import EngineSettings
from megatron.engine.deepspeed_config import check_zero_stage
from megatron.errors import ConfigError
from megatron.training.micro_batches import take_micro_batches
from tests.engine.engine_cases import for_step, make_engine, micro_batches, model_config
from tests.engine.grid_cases import LOSS_BF16, Cell, Form, Mesh3
from tests.engine.test_engine_grid import check
from tests.parallel.ranks import run_ranks

SETTINGS = EngineSettings(gradient_accumulation=2, gradient_clipping=0.5)


@pytest.mark.parametrize(
    ("mesh", "work"),
    [
        ((1, 1, 2), [("metala", Form(2)), ("metala", Form(3, recompute=True, tied=False)), ("based", Form(3))]),
        pytest.param(
            (1, 2, 2),
            [("metala", Form(2, tied=False)), ("metala", Form(3, recompute=True)), ("jrt", Form(3, sequence=True))],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_equal_to_one_process(mesh: Mesh3, work: list[Cell]) -> None:
    """The tolerances of the grid, which holds all mixers on all meshes in its slow part."""
    check(mesh, work)


@pytest.mark.slow
def test_bf16() -> None:
    check((1, 1, 2), [("metala", Form(2, dtype="bf16")), ("metala", Form(3, dtype="bf16"))], LOSS_BF16, torch.inf, torch.inf)


def _state(stage: int) -> dict[str, Any]:
    """What a rank holds, a resume into another engine, an evaluation, and weights without their optimizer."""
    settings = replace(SETTINGS, zero_stage=stage)
    first = make_engine(1, 1, "deepspeed", settings, model_config())
    batches = micro_batches(first.mesh)
    for _ in range(3):
        first.train_step(for_step(first, batches), 5e-3)
    weights = {name: w.clone() for name, w in first.weights().items()}
    slices = first.optimizer_slices()
    second = make_engine(1, 1, "deepspeed", replace(settings, seed=99), model_config())
    second.load_weights(weights)
    second.load_optimizer_slices(slices)
    on, back = (e.train_step(for_step(e, micro_batches(e.mesh, start=6)), 5e-3) for e in (first, second))
    evals = [e.eval_loss(take_micro_batches(micro_batches(e.mesh, start=1000), 2)).loss for e in (first, second)]
    second.load_weights(weights)
    second.refresh_master_from_weights()
    fresh = next(iter(second.optimizer_slices().values()))
    held = sum(p.numel() + getattr(p, "ds_tensor", p).numel() for p in first.parameters().values())
    return {
        "ranges": {name: (s.start, s.stop, weights[name].numel()) for name, s in slices.items()},
        "numbers": [(float(a), float(b)) for a, b in ((on.loss, back.loss), (on.grad_norm, back.grad_norm), evals)],
        "equal": all(torch.equal(w, second.weights()[name]) for name, w in weights.items()),
        "step": fresh.step,
        "moment": float(fresh.moments["exp_avg"].abs().max()),
        "held": held,
        "describe": first.describe(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_state_of_each_rank(stage: int) -> None:
    ranks = run_ranks(_state, 2, stage)
    for got in ranks:
        assert all(a == b for a, b in got["numbers"]), "a resume is bitwise identical"
        assert got["equal"]
        assert (got["step"], got["moment"]) == (0, 0.0)
        assert f"ZeRO-{stage}" in got["describe"]
    for name, (_, _, numel) in (ranks[0]["ranges"] | ranks[1]["ranges"]).items():
        pieces = sorted(r["ranges"][name][:2] for r in ranks if name in r["ranges"])
        assert [pieces[0][0], pieces[-1][1]] == [0, numel]
        assert all(a[1] == b[0] for a, b in pairwise(pieces)), "each number has one owner"


@pytest.mark.parametrize(("stage", "pipeline"), [(2, 2), (3, 4), (4, 1)])
def test_what_is_refused(stage: int, pipeline: int) -> None:
    with pytest.raises(ConfigError, match="does not go together|there is no ZeRO stage"):
        check_zero_stage(stage, pipeline)
