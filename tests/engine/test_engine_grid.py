"""Every mixer x every mesh of up to four ranks x ZeRO 0 and 1 x recomputation x tied equals one process.

The normal suite runs one cell per mixer, another mesh for each; the whole grid is
`nice -n 15 .venv/bin/python -m pytest tests/engine/test_engine_grid.py -m slow -s`, which prints its count.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.engine.engine_cases import join
from tests.engine.grid_cases import FORMS, MESHES, Form, alone, cells, mixers
from tests.parallel.ranks import run_ranks

# fp32 sums in another order: 1e-7 relative, grown by three steps. Adam divides by the root of tiny second moments, so rounding
# of 1e-7 in a gradient may move a weight by a hundredth of a step (lr 1e-2).
LOSS, NORM, WEIGHT = 1e-5, 1e-4, 2e-4
# bf16 rounds activations to 8 bits, differently for each layout; masters and gradient sums are fp32: losses within 0.5 %.
LOSS_BF16 = 5e-3


def relative(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def check(got: list[dict[str, Any]], want: dict[str, Any]) -> None:
    """All ranks' results of one cell against the referee."""
    for rank in got:
        assert rank["losses"] == got[0]["losses"], "every rank must report the same loss"
        assert rank["norms"] == got[0]["norms"]
    assert relative(got[0]["losses"], want["losses"]) <= LOSS
    assert relative(got[0]["norms"], want["norms"]) <= NORM
    whole = join(got)
    assert set(whole) == set(want["weights"])
    worst = max((whole[name] - w).abs().max().item() for name, w in want["weights"].items())
    assert worst <= WEIGHT, worst


def run(mixer: str, mesh: tuple[int, int, int], forms: list[Form]) -> int:
    """Check the forms of one mixer on one mesh; how many there were. A refused mixer is skipped with the reason it gave."""
    pp, tp, dp = mesh
    world = pp * tp * dp
    results = run_ranks(cells, world, "deepspeed", mixer, pp, tp, forms, connect=world > 1, timeout=300)
    for i, form in enumerate(forms):
        got = [rank[i] for rank in results]
        if isinstance(got[0], str):
            pytest.skip(f"{mixer} on pipeline {pp} x tensor {tp}: {got[0]}")
        check(got, alone(mixer, form))
    return len(forms)


WIDE = [mesh for mesh in MESHES if mesh[0] * mesh[1] * mesh[2] == 4]


@pytest.mark.parametrize(("number", "mixer"), list(enumerate(mixers())), ids=mixers())
def test_a_cell_per_mixer(number: int, mixer: str) -> None:
    run(mixer, WIDE[number % len(WIDE)], [FORMS[(3 * number + 1) % len(FORMS)]])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"pp{m[0]}tp{m[1]}dp{m[2]}")
@pytest.mark.parametrize("mixer", mixers())
def test_the_whole_grid(mixer: str, mesh: tuple[int, int, int]) -> None:
    count = run(mixer, mesh, FORMS)
    print(f"grid: {count} cells of {mixer} on pipeline {mesh[0]} x tensor {mesh[1]} x data {mesh[2]} equal one process")
    assert count == 8


def test_the_grid_is_whole() -> None:
    assert len(MESHES) == 9
    assert {max(m[0] for m in MESHES), max(m[1] for m in MESHES), max(m[2] for m in MESHES)} == {4, 2}
    assert len(FORMS) == 8
    assert "metala" in mixers()


def _streams(form: Form) -> tuple[tuple[int, int, int], list[float], list[float]]:
    """Place, first random numbers after the engine was built, and losses with dropout."""
    from megatron.engine.build import build_engine
    from megatron.launch.environment import read_rank_environment
    from megatron.parallel.mesh import Mesh
    from tests.engine.engine_cases import GLOBAL, micro_batches
    from tests.engine.grid_cases import model, settings

    env = read_rank_environment()
    mesh = Mesh.create(1, 2, env.world_size, env.rank)
    made = replace(settings(form), micro_batch=GLOBAL // mesh.dp)
    engine = build_engine("deepspeed", model("metala", form), mesh, made)
    state = torch.get_rng_state()
    drawn = torch.rand(4).tolist()
    torch.set_rng_state(state)
    batches = micro_batches(mesh)
    losses = [float(engine.train_step(batches, 1e-3).loss) for _ in range(3)]
    return (mesh.pp_rank, mesh.dp_rank, mesh.tp_rank), drawn, losses


def test_dropout_differs_per_data_rank_and_repeats_per_seed() -> None:
    form = Form(dropout=0.2)
    by_place = {place: (drawn, losses) for place, drawn, losses in run_ranks(_streams, 4, form)}
    for d in (0, 1):
        assert by_place[0, d, 0][0] == by_place[0, d, 1][0], "tensor ranks hold the same activations and drop the same"
    assert by_place[0, 0, 0][0] != by_place[0, 1, 0][0], "data ranks drop different ones"
    again = {place: losses for place, _, losses in run_ranks(_streams, 4, form)}
    assert {place: losses for place, (_, losses) in by_place.items()} == again, "the same seed, the same run"
    other = run_ranks(_streams, 4, replace(form, seed=99))
    assert other[0][2] != again[0, 0, 0]


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_under_tensor_parallelism_equals_one_process(recompute: bool) -> None:
    form = Form(dropout=0.2, recompute=recompute)
    check([rank[0] for rank in run_ranks(cells, 2, "deepspeed", "metala", 1, 2, [form])], alone("metala", form))


@pytest.mark.parametrize(
    ("mixer", "mesh", "form"),
    [
        ("metala", (1, 2, 1), Form(sequence=True)),
        ("metala", (2, 2, 1), Form(sequence=True, recompute=True, tied=False)),
        ("base_conv", (1, 2, 2), Form(sequence=True)),
    ],
)
def test_sequence_parallel_equals_one_process(mixer: str, mesh: tuple[int, int, int], form: Form) -> None:
    assert run(mixer, mesh, [form]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [m for m in MESHES if m[1] > 1], ids=lambda m: f"pp{m[0]}tp{m[1]}dp{m[2]}")
@pytest.mark.parametrize("mixer", mixers())
def test_sequence_parallel_on_every_mesh(mixer: str, mesh: tuple[int, int, int]) -> None:
    count = run(mixer, mesh, [replace(form, sequence=True) for form in FORMS])
    print(f"sequence parallel: {count} cells of {mixer} equal one process")


def test_sequence_parallel_is_refused_where_it_cannot_be_exact() -> None:
    for mixer, form, words in (
        ("mamba", Form(sequence=True), "sums over the ranks 2 times"),
        ("metala", Form(sequence=True, dropout=0.1), "hidden_dropout"),
    ):
        for rank in run_ranks(cells, 2, "deepspeed", mixer, 1, 2, [form]):
            assert "sequence_parallel cannot be exact here" in rank[0]
            assert words in rank[0]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"pp{m[0]}tp{m[1]}dp{m[2]}")
def test_bf16_with_fp32_sums_on_every_mesh(mesh: tuple[int, int, int]) -> None:
    pp, tp, dp = mesh
    forms, world = [Form(dtype="bf16"), Form(dtype="bf16", sequence=True)], pp * tp * dp
    for got in run_ranks(cells, world, "deepspeed", "metala", pp, tp, forms, connect=world > 1)[0]:
        assert relative(got["losses"], alone("metala", forms[0])["losses"]) <= LOSS_BF16
