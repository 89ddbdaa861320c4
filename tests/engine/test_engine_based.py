"""Based, JRT and Mamba models train alike on every mesh: five blocks of different mixers, tied head, JRT's objective.

The same limits as for MetaLA (`test_engine_parity.py`): fp32 losses within 1e-5, gradient norms within 1e-4.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest

from megatron.engine.base import EngineSettings
from megatron.engine.schedule import learning_rate
from megatron.model.config import ModelConfig
from megatron.model.objectives import Objective
from megatron.training.micro_batches import take_micro_batches
from tests.engine.engine_cases import CURVE, for_step, join, make_engine, micro_batches
from tests.parallel.ranks import run_ranks

KINDS = ("base_conv", "based", "sliding", "jrt", "mamba")
OPTIONS: dict[str, dict[str, Any]] = {
    "based": {"feature_width": 6, "heads": 8, "decay": True},
    "sliding": {"window": 5},
    "jrt": {"feature_width": 6, "prefix_length": 8},
}
MODEL = ModelConfig(64, 32, 5, 4, 48, KINDS, OPTIONS, norm="rmsnorm", norm_eps=1e-5, residual_fp32=True)
MAMBA = replace(MODEL, layer_types=("mamba",) * 4, num_layers=4, layer_options={}, mlp="none", mlp_width=0)
SETTINGS = EngineSettings(
    gradient_accumulation=2,
    gradient_clipping=0.5,
    zero_stage=1,
    weight_decay_rule="based",
    objective=Objective("jrt", 8, 0.25),
)
# pp, tp, world
MESHES = {"tp4": (1, 4, 4), "tp2pp2": (2, 2, 4), "dp2": (1, 1, 2)}


def job(
    pp: int, tp: int, kind: str, settings: EngineSettings, config: ModelConfig, steps: int, segments: bool
) -> dict[str, Any]:
    """Train; losses, norms, parts of the loss, weights."""
    engine = make_engine(pp, tp, kind, settings, config)
    batches = micro_batches(engine.mesh, segments)
    losses, norms, parts = [], [], []
    for step in range(steps):
        result = engine.train_step(for_step(engine, batches), learning_rate(step, CURVE))
        losses.append(float(result.loss))
        norms.append(float(result.grad_norm))
        parts.append(dict(engine.loss_parts))
    return {
        "losses": losses,
        "norms": norms,
        "parts": parts,
        "eval": engine.eval_loss(take_micro_batches(micro_batches(engine.mesh, segments, start=1000), 2)).loss,
        "weights": {name: w.float().clone() for name, w in engine.weights().items()},
        "replicas": engine.replica_names,
        "coordinates": (engine.mesh.pp_rank, engine.mesh.dp_rank, engine.mesh.tp_rank),
        "cuts": {name: engine.specs[name].cut for name in engine.weights()},
    }


@functools.cache
def oracle(dtype: str = "fp32", segments: bool = False, mamba: bool = False) -> dict[str, Any]:
    settings = replace(SETTINGS, zero_stage=0, dtype=dtype)
    return run_ranks(job, 1, 1, 1, "single", settings, MAMBA if mamba else MODEL, 8, segments, connect=False)[0]


def relative(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_fp32_equals_one_process(mesh: str) -> None:
    pp, tp, world = MESHES[mesh]
    want = oracle()
    results = run_ranks(job, world, pp, tp, "deepspeed", SETTINGS, MODEL, 8, False, timeout=120)
    for got in results:
        assert got["losses"] == results[0]["losses"] and got["parts"] == results[0]["parts"], "the same on every rank"
    assert relative(results[0]["losses"], want["losses"]) <= 1e-5
    assert relative(results[0]["norms"], want["norms"]) <= 1e-4
    assert relative([results[0]["eval"]], [want["eval"]]) <= 1e-5
    for got, expected, loss in zip(results[0]["parts"], want["parts"], want["losses"], strict=True):
        assert relative([got["ntp_loss"], got["mlm_loss"]], [expected["ntp_loss"], expected["mlm_loss"]]) <= 1e-5
        assert abs(expected["ntp_loss"] + 0.25 * expected["mlm_loss"] - loss) <= 1e-5 * loss
    whole = join(results)
    assert set(whole) == set(want["weights"])
    worst = max((whole[n] - w).abs().max().item() for n, w in want["weights"].items())
    assert worst <= 2e-4, worst  # as for MetaLA: Adam divides by the root of tiny second moments


@pytest.mark.slow
@pytest.mark.parametrize("segments", [False, True])
def test_widest_mesh_and_documents(segments: bool) -> None:
    got = run_ranks(job, 8, 2, 4, "deepspeed", SETTINGS, MODEL, 4, segments, timeout=180)[0]
    want = oracle(segments=segments)["losses"][:4]
    assert relative(got["losses"], want) <= 1e-5
    assert not segments or relative(want, oracle()["losses"][:4]) > 1e-4, "boundaries must matter in this test"


@pytest.mark.slow
def test_mamba_without_mlp_on_two_by_two() -> None:
    got = run_ranks(job, 4, 2, 2, "deepspeed", SETTINGS, MAMBA, 8, True, timeout=120)[0]
    assert relative(got["losses"], oracle(segments=True, mamba=True)["losses"]) <= 1e-5


@pytest.mark.slow
def test_bf16_with_fp32_residual_through_the_pipeline() -> None:
    """bf16 rounds activations differently per layout: losses within 0.5 %, as for MetaLA."""
    got = run_ranks(job, 4, 2, 2, "deepspeed", replace(SETTINGS, dtype="bf16"), MODEL, 8, False, timeout=120)[0]
    assert relative(got["losses"], oracle("bf16")["losses"]) <= 5e-3
    assert relative(got["losses"], oracle()["losses"]) <= 1e-2


@pytest.mark.slow
def test_activation_checkpointing_is_bit_equal() -> None:
    settings = replace(SETTINGS, zero_stage=0, activation_checkpoint_interval=1)
    got = run_ranks(job, 1, 1, 1, "single", settings, MODEL, 8, False, connect=False)[0]
    assert got["losses"] == oracle()["losses"]
