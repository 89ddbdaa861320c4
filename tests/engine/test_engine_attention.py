"""Attention models on meshes: slopes by global head, grouped queries, biases added once, learned positions in stage 0."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron.engine.base import EngineSettings
from megatron.model.config import ModelConfig
from tests.engine.engine_cases import SEQ, join, model_config, train
from tests.parallel.ranks import run_ranks

SETTINGS = EngineSettings(gradient_accumulation=2, gradient_clipping=0.5, zero_stage=1)
ATTENTION = model_config(layer_types=("global", "alibi", "sliding", "global"), norm="layernorm", mlp="plain", mlp_bias=True)
MODELS = {
    "neox": replace(
        ATTENTION, learned_positions=SEQ, parallel_residual=True, layer_options={"global": {"bias": True, "qk_norm": True}}
    ),
    "grouped": replace(
        ATTENTION,
        embedding_norm=True,
        layer_options={
            "global": {"positions": "rotary", "kv_heads": 2, "bias": True},
            "alibi": {"bias": True, "positions": "alibi"},
            "sliding": {"window": 5},
        },
    ),
}


@pytest.mark.parametrize(("pp", "tp"), [(2, 2), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((1, 2), (2, 1)))])
@pytest.mark.parametrize("name", [n if n == "grouped" else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_meshes_equal_one_process(name: str, pp: int, tp: int) -> None:
    check(MODELS[name], pp, tp)


@pytest.mark.slow
def test_four_tensor_ranks() -> None:
    """One head per rank: slopes of a list of one head would be wrong on three of the four."""
    check(MODELS["neox"], 1, 4)


def check(config: ModelConfig, pp: int, tp: int) -> None:
    want = run_ranks(train, 1, 1, 1, "single", SETTINGS, config, steps=6, segments=True, connect=False)[0]
    results = run_ranks(train, pp * tp, pp, tp, "deepspeed", SETTINGS, config, steps=6, segments=True)
    for got, loss in zip(results[0]["losses"], want["losses"], strict=True):
        assert abs(got - loss) / loss <= 1e-5  # fp32: sums in another order
    whole = join(results)
    assert set(whole) == set(want["weights"])
    # Adam divides by the root of tiny second moments; a key bias has a gradient of rounding noise alone
    worst = max((whole[n] - w).abs().max().item() for n, w in want["weights"].items() if not n.endswith("k_proj.bias"))
    assert worst <= 3e-4, worst
