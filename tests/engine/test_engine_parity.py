"""Meshes train like one process over ten steps: losses, gradient norms, evaluation, final weights.

Every mixer on every mesh, over fewer steps, is `test_engine_grid.py`'s.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from megatron.engine.base import EngineSettings
from tests.engine.engine_cases import join, model_config, train
from tests.parallel.ranks import run_ranks

STEPS = 10
# pp, tp, world
MESHES = {"dp2": (1, 1, 2), "tp2pp2": (2, 2, 4)}
CLIPPED = EngineSettings(gradient_accumulation=2, gradient_clipping=0.5, zero_stage=1)


@functools.cache
def oracle(tied: bool, dtype: str = "fp32", segments: bool = False) -> dict[str, Any]:
    settings = EngineSettings(gradient_accumulation=2, gradient_clipping=0.5, dtype=dtype)
    return run_ranks(train, 1, 1, 1, "single", settings, model_config(tied), STEPS, segments=segments, connect=False)[0]


def relative(a: list[float], b: list[float]) -> float:
    """Largest relative difference over the steps that both have."""
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=False))


@pytest.mark.parametrize(
    ("mesh", "tied"),
    [("dp2", True), ("tp2pp2", True), pytest.param("tp2pp2", False, marks=pytest.mark.slow)],
    ids=["dp2-tied", "tp2pp2-tied", "tp2pp2-untied"],
)
def test_fp32_equals_one_process(mesh: str, tied: bool) -> None:
    pp, tp, world = MESHES[mesh]
    want = oracle(tied)
    results = run_ranks(train, world, pp, tp, "deepspeed", CLIPPED, model_config(tied), STEPS)
    for got in results:
        assert got["losses"] == results[0]["losses"], "every rank must report the same loss"
        assert got["norms"] == results[0]["norms"]
        assert got["eval"] == results[0]["eval"]
    assert relative(results[0]["losses"], want["losses"]) <= 1e-5
    assert relative(results[0]["norms"], want["norms"]) <= 1e-4
    assert relative([results[0]["eval"]], [want["eval"]]) <= 1e-5
    assert want["norms"][0] > 0.5, "clipping must be at work"
    whole = join(results)
    assert set(whole) == set(want["weights"])
    worst = max((whole[n] - w).abs().max().item() for n, w in want["weights"].items())
    # Adam divides by the root of tiny second moments: rounding of 1e-7 in a gradient may move a weight by 1e-4 of a step.
    assert worst <= 2e-4, worst
    print(f"{mesh} {tied}: loss {relative(results[0]['losses'], want['losses']):.1e} weights {worst:.1e}")


@pytest.mark.slow
def test_eight_ranks_equal_one_process() -> None:
    """All three axes at once; `test_engine_grid.py` has the meshes of four."""
    got = run_ranks(train, 8, 2, 2, "deepspeed", CLIPPED, model_config(), steps=8, timeout=150)[0]
    assert relative(got["losses"], oracle(True)["losses"]) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_bf16_follows_one_process(mesh: str) -> None:
    """bf16 rounds activations differently per layout: every loss within 0.5 %."""
    pp, tp, world = MESHES[mesh]
    settings = EngineSettings(gradient_accumulation=2, gradient_clipping=0.5, zero_stage=1, dtype="bf16")
    got = run_ranks(train, world, pp, tp, "deepspeed", settings, model_config(), STEPS)[0]
    assert len(got["losses"]) == STEPS
    assert relative(got["losses"], oracle(True, "bf16")["losses"]) <= 5e-3
    assert relative(got["losses"], oracle(True)["losses"]) <= 1e-2


@pytest.mark.slow
def test_bf16_without_fp32_sums_runs_too() -> None:
    settings = EngineSettings(gradient_accumulation=2, gradient_clipping=0.5, dtype="bf16", fp32_grad_accum=False)
    got = run_ranks(train, 2, 2, 1, "deepspeed", settings, model_config(), steps=6)[0]
    assert relative(got["losses"], oracle(True, "bf16")["losses"]) <= 1e-2


def test_deepspeed_on_one_process_equals_single() -> None:
    got = run_ranks(train, 1, 1, 1, "deepspeed", CLIPPED, model_config(), STEPS, connect=False)[0]
    assert relative(got["losses"], oracle(True)["losses"]) <= 1e-6


@pytest.mark.slow
def test_stage_0_with_clipping_and_pipeline_is_run_right_and_said() -> None:
    settings = EngineSettings(gradient_accumulation=2, gradient_clipping=0.5, zero_stage=0)
    got = run_ranks(train, 2, 2, 1, "deepspeed", settings, model_config(), STEPS)[0]
    assert relative(got["losses"], oracle(True)["losses"]) <= 1e-5
    assert "stage 0 runs as stage 1" in got["describe"]


@pytest.mark.slow
@pytest.mark.parametrize("interval", [1, 3])
def test_activation_checkpointing_changes_nothing(interval: int) -> None:
    settings = EngineSettings(gradient_accumulation=2, gradient_clipping=0.5, activation_checkpoint_interval=interval)
    one = run_ranks(train, 1, 1, 1, "single", settings, model_config(), steps=6, connect=False)[0]
    assert one["losses"] == oracle(True)["losses"][:6], "bit-equal: the same operations run again"
    two = run_ranks(train, 2, 2, 1, "deepspeed", settings, model_config(), steps=6)[0]
    assert relative(two["losses"], oracle(True)["losses"]) <= 1e-5


@pytest.mark.slow
def test_document_boundaries_travel_through_the_pipeline() -> None:
    got = run_ranks(train, 4, 2, 2, "deepspeed", CLIPPED, model_config(), steps=4, segments=True)[0]
    want = oracle(True, segments=True)
    assert relative(got["losses"], want["losses"]) <= 1e-5
    assert relative(want["losses"], oracle(True)["losses"]) > 1e-4, "boundaries must matter in this test"


@pytest.mark.slow
def test_replicated_parameters_stay_bit_equal_and_stages_hold_their_own_only() -> None:
    results = run_ranks(train, 4, 2, 2, "deepspeed", CLIPPED, model_config(), steps=3)
    by_place = {r["coordinates"]: r for r in results}
    for stage in (0, 1):
        a, b = by_place[(stage, 0, 0)], by_place[(stage, 0, 1)]
        for name, cut in a["cuts"].items():
            if cut == "replicated":
                assert torch.equal(a["weights"][name], b["weights"][name]), name
    first, last = by_place[(0, 0, 0)], by_place[(1, 0, 0)]
    assert torch.equal(first["weights"]["model.embed_tokens.weight"], last["weights"]["model.embed_tokens.weight"])
    assert not first["replicas"]
    assert last["replicas"] == {"model.embed_tokens.weight"}
    assert set(first["weights"]) & set(last["weights"]) == {"model.embed_tokens.weight"}
