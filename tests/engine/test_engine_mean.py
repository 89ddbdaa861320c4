"""The loss is a mean over the counted tokens of the global batch, however they are dealt to micro batches and ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.data.micro_batch import MicroBatch
from megatron.engine.base import EngineSettings
from megatron.engine.build import build_engine
from megatron.launch.environment import read_rank_environment
from megatron.model.objectives import Objective
from megatron.parallel.mesh import Mesh
from tests.engine.engine_cases import SEQ, VOCAB, model_config
from tests.parallel.ranks import run_ranks

ROWS = 8
CAUSAL = Objective()
JRT = Objective("jrt", prefix_length=8, masked_weight=0.25)
PREFIX = Objective("prefix", prefix_length=8)
CLOSE = 1e-6
"""fp32: sums over the same tokens in another order."""


def whole() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and masks of a global batch whose rows count 0, a few, half or all of their tokens."""
    g = torch.Generator().manual_seed(3)
    x = torch.randint(0, VOCAB, (ROWS, SEQ + 1), generator=g)
    share = torch.tensor([0.0, 0.05, 0.5, 1.0]).repeat(ROWS // 4)[:, None]
    return x[:, :-1], x[:, 1:], (torch.rand(ROWS, SEQ, generator=g) < share).float()


def dealt(micro: int, mesh: Mesh) -> Iterator[MicroBatch]:
    """The global batch in micro batches of `micro` rows, dealt to the data-parallel ranks in turn."""
    tokens, labels, mask = whole()
    for start in range(micro * mesh.dp_rank, ROWS, micro * mesh.dp):
        at = slice(start, start + micro)
        yield MicroBatch(tokens[at], labels[at], mask[at], None)


def one_step(tp: int, pp: int, micro: int, kind: str, objective: Objective, mesh: Mesh | None = None) -> dict[str, Any]:
    """Validation loss of the global batch, then a step on it: loss, norm, and parts."""
    env = read_rank_environment()
    mesh = mesh or Mesh.create(pp, tp, env.world_size, env.rank)
    settings = EngineSettings(
        micro_batch=micro, gradient_accumulation=ROWS // (micro * mesh.dp), seq_length=SEQ, objective=objective, zero_stage=1
    )
    engine = build_engine(kind, model_config(), mesh, settings, env.local_rank)
    held_out = engine.eval_loss(list(dealt(micro, mesh))).loss
    result = engine.train_step(list(dealt(micro, mesh)), 1e-2)
    found = {"eval": held_out, "loss": float(result.loss), "norm": float(result.grad_norm), **engine.loss_parts}
    engine.close()
    return found


def steps_on_ranks(tp: int, pp: int, work: list[tuple[int, Objective]]) -> list[dict[str, Any]]:
    """`one_step` for each number of rows in a micro batch and objective, on one mesh."""
    env = read_rank_environment()
    mesh = Mesh.create(pp, tp, env.world_size, env.rank)
    return [one_step(tp, pp, micro, "deepspeed", objective, mesh) for micro, objective in work]


def same(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=CLOSE), name


@pytest.mark.parametrize("objective", [CAUSAL, PREFIX, JRT], ids=lambda o: o.name)
def test_micro_batches(objective: Objective) -> None:
    want = one_step(1, 1, ROWS, "single", objective)
    assert want["eval"] == pytest.approx(want["loss"], rel=CLOSE), "validation is counted as training is"
    for micro in (1, 2, 4):
        same(one_step(1, 1, micro, "single", objective), want)


def test_the_value_is_the_mean_over_counted_tokens() -> None:
    from megatron.engine.stages import build_local, run_stages

    settings = EngineSettings(seq_length=SEQ)
    local = build_local(model_config(), Mesh.single(), settings, torch.device("cpu"))
    tokens, labels, mask = whole()
    logits = run_stages(local.stages, (tokens,))
    assert isinstance(logits, Tensor)
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    means = [float((each[:, at] * mask[:, at]).sum() / mask[:, at].sum()) for at in (slice(8, None), slice(0, 8))]
    assert one_step(1, 1, 2, "single", CAUSAL)["loss"] == pytest.approx(float((each * mask).sum() / mask.sum()), rel=CLOSE)
    parts = one_step(1, 1, 2, "single", JRT)
    assert parts["ntp_loss"] == pytest.approx(means[0], rel=CLOSE) and parts["mlm_loss"] == pytest.approx(means[1], rel=CLOSE)
    assert parts["loss"] == pytest.approx(means[0] + 0.25 * means[1], rel=CLOSE)


def test_neox_averages_the_means_of_micro_batches() -> None:
    neox = replace(CAUSAL, mean_over="micro_batch")
    same(one_step(1, 1, ROWS, "single", neox), one_step(1, 1, ROWS, "single", CAUSAL))
    norms = [one_step(1, 1, micro, "single", neox)["norm"] for micro in (1, 2, 8)]
    assert abs(norms[0] - norms[2]) > 0.05 * norms[2] and abs(norms[1] - norms[2]) > 0.05 * norms[2]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "tp", "pp"), [(2, 1, 1), (2, 2, 1), (2, 1, 2), (4, 2, 1), (4, 1, 2)])
def test_ranks(world: int, tp: int, pp: int) -> None:
    work = [(micro, objective) for objective in (CAUSAL, JRT) for micro in (1, 2)]
    want = {objective.name: one_step(1, 1, ROWS, "single", objective) for objective in (CAUSAL, JRT)}
    for found in run_ranks(steps_on_ranks, world, tp, pp, work):
        for (_, objective), got in zip(work, found, strict=True):
            same(got, want[objective.name])


def test_a_batch_without_counted_tokens_has_loss_zero() -> None:
    tokens, labels, mask = whole()
    empty = [MicroBatch(tokens[:4], labels[:4], mask[:4] * 0, None)] * 2
    settings = EngineSettings(micro_batch=4, gradient_accumulation=2, seq_length=SEQ)
    engine = build_engine("single", model_config(), Mesh.single(), settings)
    result = engine.train_step(empty, 1e-2)
    assert float(result.loss) == 0 and float(result.grad_norm) == 0
