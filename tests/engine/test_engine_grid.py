"""Every mixer x every mesh of up to four ranks x ZeRO x recomputation x tied x cut sequence equals one process.

The suite runs one cell for each mixer on each mesh, so chosen that any two choices meet somewhere, with as many layers as the
deepest pipeline needs: two, or four. All cells, of four layers, with their count and largest differences, are run by
`python -m tests.engine.grid_count`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.engine.grid_cases import (
    FORMS,
    LOSS,
    LOSS_BF16,
    MESHES,
    NORM,
    WEIGHT,
    Cell,
    Difference,
    Form,
    Mesh3,
    covering,
    every_form,
    mixers,
    run_cells,
)
from tests.parallel.ranks import run_ranks

COVERING = covering(MESHES, mixers(), every_form(), ("zero_stage", "recompute", "tied", "sequence", "batch"))
WIDE = [mesh for mesh in MESHES if mesh[0] * mesh[1] * mesh[2] == 4]


def name_of(mesh: Mesh3) -> str:
    return f"pp{mesh[0]}tp{mesh[1]}dp{mesh[2]}"


def check(mesh: Mesh3, work: list[Cell], loss: float = LOSS, norm: float = NORM, weight: float = WEIGHT) -> None:
    """All cells within the tolerances."""
    work = [(mixer, replace(form, layers=max(2, mesh[0]))) for mixer, form in work]
    for (mixer, form), found in zip(work, run_cells(mesh, work), strict=True):
        assert isinstance(found, Difference), found
        fits = found.loss <= loss and found.norm <= norm and found.weight <= weight
        assert fits, f"{mixer} {form}: {found}"


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=name_of)
def test_any_two_choices(mesh: Mesh3) -> None:
    check(mesh, COVERING[mesh])


def test_the_grid_is_whole() -> None:
    assert len(MESHES) == 9
    assert {max(m[0] for m in MESHES), max(m[1] for m in MESHES), max(m[2] for m in MESHES)} == {4, 2}
    assert len(FORMS) == 8
    assert "metala" in mixers()
    cells = [(mixer, mesh, form) for mesh, work in COVERING.items() for mixer, form in work]
    assert len(cells) == len(MESHES) * len(mixers())
    assert {form.zero_stage for _, _, form in cells} == {0, 1, 2, 3}
    assert {(mixer, form.sequence) for mixer, _, form in cells} >= {(m, True) for m in mixers() if m != "mamba"}


def _streams(forms: list[Form]) -> tuple[tuple[int, int, int], list[list[float]], list[list[float]]]:
    """Place; for each form the first random numbers after its engine was built, and its losses with dropout."""
    from megatron.engine.build import build_engine
    from megatron.launch.environment import read_rank_environment
    from megatron.parallel.mesh import Mesh
    from tests.engine.engine_cases import GLOBAL, for_step, micro_batches
    from tests.engine.grid_cases import model, settings

    env = read_rank_environment()
    mesh = Mesh.create(1, 2, env.world_size, env.rank)
    drawn, losses = [], []
    for form in forms:
        made = replace(settings(form), micro_batch=GLOBAL // mesh.dp)
        engine = build_engine("deepspeed", model("metala", form), mesh, made)
        state = torch.get_rng_state()
        drawn.append(torch.rand(4).tolist())
        torch.set_rng_state(state)
        batches = micro_batches(mesh)
        losses.append([float(engine.train_step(for_step(engine, batches), 1e-3).loss) for _ in range(3)])
        engine.close()
    return (mesh.pp_rank, mesh.dp_rank, mesh.tp_rank), drawn, losses


@pytest.mark.slow
def test_dropout_differs_per_data_rank_and_repeats_per_seed() -> None:
    form = Form(dropout=0.2, layers=2)
    found = run_ranks(_streams, 4, [form, form, replace(form, seed=99)])
    first = {place: drawn[0] for place, drawn, _ in found}
    for d in (0, 1):
        assert first[0, d, 0] == first[0, d, 1], "tensor ranks hold the same activations and drop the same"
    assert first[0, 0, 0] != first[0, 1, 0], "data ranks drop different ones"
    for _, _, (once, again, other) in found:
        assert once == again, "the same seed, the same run"
        assert other != again


@pytest.mark.slow
def test_dropout_under_tensor_parallelism_equals_one_process() -> None:
    check((1, 2, 1), [("metala", Form(dropout=0.2, recompute=recompute)) for recompute in (False, True)])


@pytest.mark.slow
def test_sequence_parallel_equals_one_process() -> None:
    check((1, 2, 1), [("metala", Form(sequence=True)), ("base_conv", Form(sequence=True))])
    check((2, 2, 1), [("metala", Form(sequence=True, recompute=True, tied=False))])


def test_sequence_parallel_is_refused_where_it_cannot_be_exact() -> None:
    cells: list[Cell] = [("mamba", Form(sequence=True)), ("metala", Form(sequence=True, dropout=0.1))]
    words = ("sums over the ranks 2 times", "hidden_dropout")
    for found, word in zip(run_cells((1, 2, 1), cells), words, strict=True):
        assert isinstance(found, str)
        assert "sequence_parallel cannot be exact here" in found
        assert word in found


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 1, 1), *WIDE], ids=name_of)
def test_bf16_with_fp32_sums(mesh: Mesh3) -> None:
    """The loss alone is held: weights differ by whole steps of Adam where a gradient rounds to another sign."""
    forms = [Form(dtype="bf16"), Form(dtype="bf16", sequence=True)][: 2 if mesh[1] > 1 else 1]
    check(mesh, [("metala", form) for form in forms], loss=LOSS_BF16, norm=torch.inf, weight=torch.inf)
