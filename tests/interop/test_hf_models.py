"""Softmax models and the classes of transformers: the same logits both ways, the same tensors after a round trip, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from megatron.checkpoint.load import read_full_weights
from megatron.checkpoint.save import save_weights
from megatron.errors import ExportError
from megatron.export.hf import export_checkpoint
from megatron.generation.load import load_model
from megatron.interop.hf_classes import family_of
from megatron.interop.import_hf import import_folder
from megatron.layers.base import Context
from megatron.model.build import param_specs
from megatron.model.config import ModelConfig
from tests.export.conftest import random_weights

LIMIT = 1e-5
"""Of a logit, relative to the largest (fp32)."""
SMALL = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
FOREIGN: dict[str, dict[str, Any]] = {
    "gpt_neox": {"intermediate_size": 80, "rotary_pct": 0.5, "rotary_emb_base": 5000},
    "gpt_neox sequential": {
        "intermediate_size": 80,
        "use_parallel_residual": False,
        "attention_bias": False,
        "rotary_pct": 1.0,
    },
    "llama": {"intermediate_size": 80, "num_key_value_heads": 4, "rope_theta": 5e5},
    "llama tied biases": {"intermediate_size": 80, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "mistral": {"intermediate_size": 80, "num_key_value_heads": 4, "sliding_window": 7},
    "bloom": {"num_attention_heads": 12, "hidden_size": 96},
    "mpt": {"learned_pos_emb": False, "num_attention_heads": 12, "hidden_size": 96},
}


def tokens() -> torch.Tensor:
    return torch.randint(0, 96, (2, 60), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=FOREIGN)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder that transformers itself wrote, every parameter random."""
    kind = request.param.split()[0]
    values = {**SMALL, **FOREIGN[request.param]}
    config = transformers.AutoConfig.for_model(kind, **values)
    model = AutoModelForCausalLM.from_config(config)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 0.2) + ("norm" in name))
    model.save_pretrained(tmp_path / "foreign")
    return tmp_path / "foreign"


@torch.inference_mode()
def test_import_then_export_keep_logits_and_tensors(folder: Path, tmp_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    imported = import_folder(folder, tmp_path / "ours")
    ours, _ = load_model(imported.checkpoint)
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    want = theirs(ids).logits
    assert (ours(ids)[0] - want).abs().max() <= LIMIT * want.abs().max()
    hidden = theirs(ids, attention_mask=mask).logits
    assert ((ours(ids, Context(mask=mask))[0] - hidden) * mask[..., None]).abs().max() <= LIMIT * want.abs().max()
    made = export_checkpoint(imported.checkpoint, tmp_path / "back")
    assert made.difference <= LIMIT and not list(made.folder.glob("*.py"))
    back = AutoModelForCausalLM.from_pretrained(made.folder)
    assert type(back) is type(theirs)
    before, after = theirs.state_dict(), back.state_dict()
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
    said, kept = (json.loads((place / "config.json").read_text()) for place in (folder, made.folder))
    for key in ("rope_parameters", "sliding_window", "attn_config", "use_parallel_residual", "tie_word_embeddings"):
        assert said.get(key) == kept.get(key), key


@pytest.mark.slow
def test_a_tensor_parallel_run_of_an_imported_model(folder: Path, tmp_path: Path) -> None:
    """8 or 12 heads, 4 of keys and values where they are grouped, on 2 and 4 ranks."""
    from tests.export.native_ranks import logits_on_ranks
    from tests.parallel.ranks import run_ranks

    imported = import_folder(folder, tmp_path / "ours")
    with torch.inference_mode():
        want = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens()).logits
    for size in (2, 4):
        for got in run_ranks(logits_on_ranks, size, str(imported.checkpoint), tokens()):
            assert (got - want).abs().max() <= LIMIT * want.abs().max()


NATIVE = ModelConfig(
    96, 48, 2, 4, 192, ("global", "flash"), {"global": {"positions": "rotary", "rotary_fraction": 0.5, "bias": True}},
    norm="layernorm", norm_eps=1e-5, mlp="plain", activation="gelu", mlp_bias=True, parallel_residual=True,
    tie_embeddings=False,
)  # fmt: skip
ROTARY = {"global": {"positions": "rotary"}}
LLAMA = replace(
    NATIVE, layer_options=ROTARY, norm="rmsnorm", mlp="gated", activation="silu", mlp_bias=False, parallel_residual=False
)
MPT = replace(
    NATIVE, layer_types=("alibi",) * 2, layer_options={}, norm="layernorm_no_bias", mlp_bias=False, parallel_residual=False,
    tie_embeddings=True,
)  # fmt: skip
CASES = {
    "gpt_neox": NATIVE,
    "llama": LLAMA,
    "mistral": replace(LLAMA, layer_options={"global": {"positions": "rotary", "window": 9, "kv_heads": 2}}),
    "mpt": MPT,
    "bloom": replace(
        MPT,
        norm="layernorm",
        mlp_bias=True,
        activation="gelu_tanh",
        embedding_norm=True,
        layer_options={"alibi": {"bias": True}},
    ),
    "linear_lm": replace(LLAMA, layer_options={"global": {"positions": "rotary", "rotary_fraction": 0.5}}),
    "linear_lm learned": replace(NATIVE, learned_positions=128, layer_options={}),
    "linear_lm mixed": replace(LLAMA, layer_types=("alibi", "sliding"), layer_options={"sliding": {"window": 5}}),
    "linear_lm steeper": replace(MPT, layer_options={"alibi": {"bias_max": 4.0}}),
    "linear_lm qk norm": replace(LLAMA, layer_options={"global": {"positions": "rotary", "qk_norm": True}}),
    "linear_lm shared": replace(NATIVE, shared_norm=True),
}


@pytest.mark.parametrize("name", CASES)
def test_our_models_go_to_the_class_that_can_hold_them(name: str, tmp_path: Path) -> None:
    config = CASES[name]
    assert family_of(config)[0].name == name.split()[0]
    weights = random_weights(config)
    checkpoint = save_weights(tmp_path / "run", weights, param_specs(config), model_config=config.to_dict(), facts={})
    made = export_checkpoint(checkpoint, tmp_path / "hf")
    assert made.family == name.split()[0] and made.difference <= LIMIT
    back = import_folder(made.folder, tmp_path / "back")
    again = read_full_weights(back.checkpoint)
    assert set(again) == set(weights) and all(torch.equal(again[n], weights[n]) for n in weights)
    a, b = load_model(checkpoint)[0], load_model(back.checkpoint)[0]
    assert torch.equal(a(tokens())[0], b(tokens())[0])


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rotary scaling 'linear'"),
        ("llama", {"head_dim": 16}, "head width of 16"),
        ("gpt_neox", {"hidden_act": "gelu_10"}, "the activation 'gelu_10'"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "residual taken after the norm"),
        ("mpt", {"attn_config": {"clip_qkv": 8.0}}, "clip_qkv"),
    ],
)
def test_what_is_not_built_is_refused(kind: str, change: dict[str, Any], said: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(json.dumps({"model_type": kind, **SMALL, **change}))
    save_file({"x": torch.zeros(1)}, tmp_path / "in" / "model.safetensors")
    with pytest.raises(ExportError, match=said):
        import_folder(tmp_path / "in", tmp_path / "out")


def test_missing_and_unknown_tensors_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL, "intermediate_size": 80}))
    save_file({"model.layers.0.self_attn.z_proj.weight": torch.zeros(1)}, tmp_path / "in" / "model.safetensors")
    with pytest.raises(ExportError, match=r"unknown: model\.layers\.0\.self_attn\.z_proj"):
        import_folder(tmp_path / "in", tmp_path / "out")
