"""Context parallelism equals one process: every ready mixer and two hybrids on meshes of up to four ranks.

The suite runs cells in which any two choices meet; `python -m tests.engine.grid_count --part context` runs the whole grid.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron.data.micro_batch import MicroBatch
from megatron.model import objectives
from megatron.model.objectives import Objective, objective_loss
from megatron.parallel.context import ContextParallel
from megatron.parallel.context_shards import ContextShards
from megatron.parallel.mesh import Mesh
from tests.engine.context_cases import LIMIT, MESHES, bf16_cells, names, subset
from tests.engine.engine_cases import SEQ, documents
from tests.engine.grid_cases import (
    LOSS,
    LOSS_BF16,
    NORM,
    WEIGHT,
    Cell,
    Difference,
    Form,
    Mesh3,
    alone,
    cells,
    compare,
    run_cells,
)
from tests.parallel.ranks import run_ranks

PAIR = (1, 1, 2)
CP2 = Form(cp=2, short=True, layers=2, batch="documents")


def check(mesh: Mesh3, work: list[Cell], loss: float = LOSS, norm: float = NORM, weight: float = WEIGHT) -> None:
    """All cells within the tolerances."""
    for (mixer, form), difference in zip(work, run_cells(mesh, work), strict=True):
        assert isinstance(difference, Difference), difference
        fits = difference.loss <= loss and difference.norm <= norm and difference.weight <= weight
        assert fits, f"{mixer} {form}: {difference}"


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"pp{m[0]}tp{m[1]}dp{m[2]}")
def test_any_two_choices(mesh: Mesh3) -> None:
    """Losses, norms and weights within 1e-5 of one process."""
    check(mesh, subset()[mesh], LIMIT, LIMIT, LIMIT)


def test_the_grid_is_whole() -> None:
    """Eight mixers are ready, and their cells hold data-parallel ranks beside context-parallel ones."""
    work = [(mesh, name, form) for mesh, cells_ in subset().items() for name, form in cells_]
    assert len(names()) >= 10
    assert {form.zero_stage for _, _, form in work} == {0, 1, 2, 3}
    assert {(mesh, form.cp) for mesh, _, form in work} == {(m, 2) for m in MESHES} | {((1, 1, 4), 4)}
    assert {name for _, name, _ in work} == set(names())


@pytest.mark.slow
def test_bf16_with_fp32_sums() -> None:
    """Every mixer on four shards, within the limit of the data-parallel meshes."""
    work = [(name, form) for name, form in bf16_cells((1, 1, 4)) if form.cp == 4 and form.zero_stage == 1]
    check((1, 1, 4), work, loss=LOSS_BF16, norm=torch.inf, weight=torch.inf)


@pytest.mark.slow
def test_triton_kernels_in_the_interpreter() -> None:
    """One step of one layer against the torch path; not the weights, as the first step of Adam follows signs of rounding."""
    check(PAIR, [("metala", replace(CP2, backend="triton", layers=1, steps=1))], weight=torch.inf)


@pytest.mark.slow
def test_learned_positions_continue_in_the_next_shard() -> None:
    """The embedding numbers the tokens of a document that began in an earlier shard."""
    form = replace(CP2, learned=True)
    check(PAIR, [("metala", form)])


def _faulty(fault: str, work: list[Cell]) -> list[dict[str, Any] | str]:
    """On every rank: train cells with one mistake in the engine's half of context parallelism."""
    whole_shard = MicroBatch.shard

    def labels_made_per_shard(batch: MicroBatch, rank: int, size: int) -> MicroBatch:
        cut = whole_shard(batch, rank, size)
        mask = cut.loss_mask.clone()
        mask[:, -1] = 0  # the last token's label is the first token of the next shard
        return replace(cut, loss_mask=mask)

    def other_rank(batch: MicroBatch, rank: int, size: int) -> MicroBatch:
        return whole_shard(batch, size - 1 - rank, size)

    def own_ids(self: ContextShards, rows: int, ids: Any, device: Any) -> Any:
        """Documents numbered in each shard by itself, as if all began there."""
        return ContextParallel(self.mesh.cp_group, self.mesh.cp_rank, self.mesh.cp, rows, self.length, None, device=device)

    whole_build = ContextShards.build

    def from_zero(self: ContextShards, rows: int, ids: Any, device: Any) -> Any:
        shard = whole_build(self, rows, ids, device)
        shard.offset = 0
        return shard

    patches = {
        "local count": mock.patch.object(objectives, "all_reduce", lambda x, group: x * 2),
        "labels of a shard": mock.patch.object(MicroBatch, "shard", labels_made_per_shard),
        "swapped shards": mock.patch.object(MicroBatch, "shard", other_rank),
        "local ids": mock.patch.object(ContextShards, "build", own_ids),
        "local positions": mock.patch.object(ContextShards, "build", from_zero),
    }
    with patches[fault]:
        return cells("deepspeed", 1, 1, work)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["local count", "labels of a shard", "swapped shards", "local ids", "local positions"])
def test_a_fault_of_the_engine_is_visible(fault: str) -> None:
    work: list[Cell] = [("metala", replace(CP2, batch="masked", learned=True) if fault == "local positions" else CP2)]
    results = run_ranks(_faulty, 2, fault, work)
    difference = compare([rank[0] for rank in results], alone(work)[0])
    assert difference.loss > 5 * LOSS and difference.weight > 5 * WEIGHT, f"{fault}: {difference}"


def test_a_shard_keeps_labels_weights_and_the_ids_of_the_row() -> None:
    tokens = torch.arange(2 * 12).view(2, 12)
    ids = documents()[:2, :12]
    batch = MicroBatch(tokens, tokens + 1, tokens / 100, ids, [7, 8], {"prefix_length": 3, "weights": tokens * 2})
    shards = [batch.shard(rank, 3) for rank in range(3)]
    for name in ("tokens", "labels", "loss_mask"):
        assert torch.equal(torch.cat([getattr(shard, name) for shard in shards], 1), getattr(batch, name)), name
    assert [shard.offset for shard in shards] == [0, 4, 8]
    assert shards[0].labels[0, -1] == shards[1].tokens[0, 0]
    assert all(shard.segment_ids is ids and shard.sample_ids == [7, 8] for shard in shards)
    assert shards[1].inputs["prefix_length"] == 3 and torch.equal(shards[1].inputs["weights"], tokens[:, 4:8] * 2)
    assert shards[2].shard(1, 2).offset == 10


@pytest.mark.parametrize("name", ["causal", "prefix", "jrt"])
@pytest.mark.parametrize("prefix", [2, 4, 7, 10])
def test_terms_of_the_shards_add_up(name: str, prefix: int) -> None:
    """Places of a term in each shard are those of the row, each once."""
    objective = Objective(name, prefix_length=prefix)
    for number, place in enumerate(objective.places):
        parts = [torch.arange(offset, offset + 4)[objective.places_in(offset, 4)[number]] for offset in (0, 4, 8)]
        assert torch.equal(torch.cat(parts), torch.arange(12)[place])


def test_a_shard_without_counted_tokens_keeps_the_graph() -> None:
    """All of a term's tokens may lie in other shards: loss 0, and gradients of zeros instead of none."""
    logits = torch.randn(2, 4, 5, requires_grad=True)
    labels, mask = torch.ones(2, 4, dtype=torch.long), torch.ones(2, 4)

    def mean(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
        assert w is not None and x.shape[1] > 0
        return (x.logsumexp(-1) * w).sum() / w.sum().clamp_min(1e-9)

    loss, _ = objective_loss(Objective("prefix", prefix_length=9), logits, labels, mask, mean, torch.ones(1).double(), offset=4)
    loss.backward()
    assert loss == 0 and logits.grad is not None and not logits.grad.any()


def test_a_stage_builds_its_shard_once_per_pass() -> None:
    mesh = Mesh(1, 2, 1, 1, cp=2)
    shards, cpu = ContextShards(mesh, SEQ), torch.device("cpu")
    ids, others = documents(), documents()
    with mock.patch.object(ContextShards, "build", side_effect=shards.build) as build:
        first, local = shards.of(4, ids, cpu)
        assert shards.of(4, ids, cpu) == (first, local)
        assert build.call_count == 1
        assert local is not None and torch.equal(local, ids[:, SEQ // 2 :])
        assert shards.of(4, others, cpu)[0] is not first
        assert shards.of(4, None, cpu)[1] is None and shards.of(2, None, cpu)[0] is not shards.of(4, None, cpu)[0]
