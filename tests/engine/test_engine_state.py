"""What goes into a checkpoint comes back: a rebuilt engine goes on bit for bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from megatron.engine.base import EngineSettings, OptimizerSlice
from megatron.errors import CheckpointError
from tests.engine.engine_cases import for_step, make_engine, micro_batches, model_config
from tests.parallel.ranks import run_ranks

BASE = EngineSettings(gradient_accumulation=2, gradient_clipping=0.5, zero_stage=1)
CASES = [
    # kind, pp, tp, world, dtype
    ("single", 1, 1, 1, "fp32"),
    ("single", 1, 1, 1, "bf16"),
    ("deepspeed", 1, 1, 2, "fp32"),
    ("deepspeed", 2, 2, 4, "fp32"),
    ("deepspeed", 2, 1, 4, "bf16"),
]


def copied(slices: dict[str, OptimizerSlice]) -> dict[str, OptimizerSlice]:
    """What an engine gives may be views of its live state."""
    return {
        name: replace(s, master=s.master.clone(), moments={m: t.clone() for m, t in s.moments.items()})
        for name, s in slices.items()
    }


def _resume(kind: str, pp: int, tp: int, dtype: str) -> dict[str, Any]:
    settings = replace(BASE, dtype=dtype)
    first = make_engine(pp, tp, kind, settings, model_config())
    batches = micro_batches(first.mesh)
    for _ in range(3):
        first.train_step(for_step(first, batches), 5e-3)
    weights = {name: w.clone() for name, w in first.weights().items()}
    slices, extra = copied(first.optimizer_slices()), first.extra_state()
    on = [first.train_step(for_step(first, batches), 5e-3) for _ in range(3)]

    # Another seed: nothing of the new engine's own start may survive.
    second = make_engine(pp, tp, kind, replace(settings, seed=99), model_config())
    second.load_weights(weights)
    second.load_optimizer_slices(slices)
    second.load_extra_state(extra)
    again = micro_batches(second.mesh, start=6)
    back = [second.train_step(for_step(second, again), 5e-3) for _ in range(3)]
    return {
        "losses": [(float(a.loss), float(b.loss)) for a, b in zip(on, back, strict=True)],
        "norms": [(float(a.grad_norm), float(b.grad_norm)) for a, b in zip(on, back, strict=True)],
        "weights": all(torch.equal(w, second.weights()[name]) for name, w in first.weights().items()),
        "slices": {name: (s.start, s.stop, s.step, set(s.moments)) for name, s in slices.items()},
        "numel": {name: w.numel() for name, w in weights.items()},
        "masters": all(
            torch.equal(s.master.to(weights[name].dtype), weights[name].reshape(-1)[s.start : s.stop])
            for name, s in slices.items()
        ),
    }


@pytest.mark.parametrize(
    ("kind", "pp", "tp", "world", "dtype"),
    [case if case in (CASES[0], CASES[3]) else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_round_trip_is_bit_equal(kind: str, pp: int, tp: int, world: int, dtype: str) -> None:
    results = run_ranks(_resume, world, kind, pp, tp, dtype, connect=world > 1)
    for got in results:
        for pair in got["losses"] + got["norms"]:
            assert pair[0] == pair[1]
        assert got["weights"]
        assert got["masters"]
        assert all(step == 3 and moments == {"exp_avg", "exp_avg_sq"} for _, _, step, moments in got["slices"].values())


def test_data_ranks_own_every_number_once() -> None:
    results = run_ranks(_resume, 2, "deepspeed", 1, 1, "fp32")
    for name, numel in results[0]["numel"].items():
        ranges = sorted(r["slices"][name][:2] for r in results if name in r["slices"])
        assert ranges[0][0] == 0
        assert ranges[-1][1] == numel
        assert all(a[1] == b[0] for a, b in pairwise(ranges))


def _errors(kind: str) -> list[str]:
    engine = make_engine(1, 1, kind, BASE, model_config())
    slices, weights = engine.optimizer_slices(), engine.weights()
    name = next(iter(slices))
    found = []
    short = replace(slices[name], stop=slices[name].stop - 1)
    wrong = {**weights, name: weights[name][:1]}
    missing = {n: w for n, w in weights.items() if n != name}
    for action in (
        lambda: engine.load_optimizer_slices({**slices, name: short}),
        lambda: engine.load_optimizer_slices({n: s for n, s in slices.items() if n != name}),
        lambda: engine.load_weights(wrong),
        lambda: engine.load_weights(missing),
    ):
        try:
            action()
        except CheckpointError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("kind", ["single", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_what_does_not_fit_is_refused(kind: str) -> None:
    found = run_ranks(_errors, 1, kind, connect=False)[0]
    assert len(found) == 4
    assert "covers" in found[0]
    assert "missing" in found[1]
    assert "shape" in found[2]
    assert "missing" in found[3]


def _fresh_optimizer(kind: str) -> tuple[list[float], int]:
    """Weights of another run without its optimizer: masters must follow, moments must be forgotten."""
    donor = make_engine(1, 1, kind, replace(BASE, seed=5, dtype="bf16"), model_config())
    plain = make_engine(1, 1, kind, replace(BASE, seed=5, dtype="bf16"), model_config())
    used = make_engine(1, 1, kind, replace(BASE, seed=6, dtype="bf16"), model_config())
    batches = micro_batches(used.mesh)
    used.train_step(for_step(used, batches), 5e-3)
    used.load_weights(donor.weights())
    used.refresh_master_from_weights()
    losses = []
    for engine in (plain, used):
        batches = micro_batches(engine.mesh)
        losses.append([float(engine.train_step(for_step(engine, batches), 5e-3).loss) for _ in range(3)])
    assert losses[0] == losses[1]
    return losses[0], next(iter(used.optimizer_slices().values())).step


@pytest.mark.parametrize("kind", ["single", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_weights_without_optimizer(kind: str) -> None:
    losses, step = run_ranks(_fresh_optimizer, 1, kind, connect=False)[0]
    assert losses[2] < losses[0]
    assert step == 3


def test_a_slice_is_plain_data() -> None:
    part = OptimizerSlice(0, 2, torch.zeros(2), {"exp_avg": torch.zeros(2)}, 1)
    assert part.stop - part.start == part.master.numel()
