"""The softmax configurations: they start, and have the published numbers of parameters; NeoX's keys reach the layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.config.load import load_config
from megatron.config.schema import RunConfig
from megatron.model.config import ModelConfig
from megatron.model.cost import count_parameters
from megatron.settings import layer_options, model_config

CONFIGS = str(Path(__file__).resolve().parents[2] / "configs")
SIZES = {
    "attention-360m": 359_810_048,  # released attn-360m
    "attention-1b": 1_303_856_400,  # released attn-1b with the MLP of 4480
    "pythia-410m": 405_334_016,  # released pythia-410m
    "llama-1b": 1_100_048_384,  # TinyLlama
    "alibi-1.3b": 25 * (12 * 2048**2 + 2 * 2048) + 2048 + 50304 * 2048,
}


def shape(run: RunConfig) -> ModelConfig:
    return model_config(run, run.tokenizer.padded_vocab_size or 50304)


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str) -> None:
    run = load_config([name, "local_setup"], conf_dir=CONFIGS, world_size=8)
    assert run.warnings == ()
    assert count_parameters(shape(run))[0] == SIZES[name]


def test_alibi_wt103_is_the_papers_shape() -> None:
    run = load_config(["alibi-wt103"], conf_dir=CONFIGS, world_size=8)
    inner = 16 * (12 * 1024**2 + 13 * 1024) + 2 * 1024  # biases and two LayerNorms per block, and the final one
    assert count_parameters(shape(run))[1] == inner
    assert run.batch.train_batch_size * run.model.seq_length == 8 * 9216
    assert layer_options(run) == {"global": {"positions": "alibi", "bias": True, "dropout": 0.1}}
    longer = load_config(["alibi-wt103"], conf_dir=CONFIGS, world_size=8, overrides={"seq_length": 1024})
    assert longer.model.max_position_embeddings == 1024


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"positions": "learned", "bias": True}),
        ({"pos_emb": "rotary", "rotary_pct": 0.25, "rotary_emb_base": 500}, {"rotary_fraction": 0.25, "rotary_base": 500}),
        ({"num_kv_heads": 2, "sliding_window_width": 8}, {"kv_heads": 2, "window": 8}),
        ({"use_qk_layernorm": True, "attention_dropout": 0.2}, {"qk_norm": True, "dropout": 0.2}),
        ({"use_bias_in_attn_linear": False, "pos_emb": "none"}, {}),
        ({"sliding_window_width": 8, "global_window": 3}, {"window": 3}),
    ],
)
def test_neox_keys_reach_the_layer(
    load_values: Callable[..., RunConfig], changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    run = load_values({"attention_config": None, **changes})
    options = layer_options(run).get("global", {})
    assert {key: options.get(key) for key in expected} == expected
    assert expected or not options
    config = shape(run)
    assert config.learned_positions == (run.model.max_position_embeddings if run.model.pos_emb == "learned" else 0)


def test_own_options_of_other_layers_stay_alone(load_values: Callable[..., RunConfig]) -> None:
    pattern = [["alibi"], 1], [["sliding", "metala"], 1], [["global"], 1]
    run = load_values({"attention_config": [list(p) for p in pattern], "sliding_window": 5, "alibi_bias_max": 4.0})
    assert layer_options(run) == {
        "alibi": {"bias_max": 4.0, "bias": True},
        "sliding": {"window": 5},
        "global": {"positions": "learned", "bias": True},
    }


def test_blocks_and_norms(load_values: Callable[..., RunConfig]) -> None:
    changes = {"gpt_j_residual": True, "gpt_j_tied": True, "norm": "layernorm", "use_bias_in_norms": False}
    config = shape(load_values({"attention_config": None, **changes}))
    assert config.parallel_residual and config.shared_norm and config.norm == "layernorm_no_bias"
    fused = load_values({"mlp_type": "regular", "activation": "gelu", "bias_gelu_fusion": True})
    assert shape(fused).activation == "gelu_tanh"


def test_documents_apart(load_values: Callable[..., RunConfig]) -> None:
    run = load_values({"reset_attention_at_eod": True})
    assert run.training.reset_state_at_eod and "reset_attention_at_eod" in run.provenance["reset_state_at_eod"]
