"""Released layouts: what is inferred and said, both file formats, and a refusal for everything that would be another model.

Numbers of the original code are compared in tests/golden/test_based_models.py; the small folders here hold random weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM

from megatron.checkpoint.load import read_full_weights
from megatron.errors import ExportError
from megatron.generation.load import load_model
from megatron.interop.import_hf import import_folder
from megatron.interop.released import is_released

D, H, F, M, ROWS = 32, 4, 6, 48, 40
MIXER = "based.models.mixers."
SETTINGS: dict[str, Any] = {
    "n_embd": D,
    "n_head": H,
    "n_layer": 3,
    "rms_norm": True,
    "residual_in_fp32": True,
    "rotary_emb_fraction": 1,
    "vocab_size": 37,
    "mixer": {"_target_": MIXER + "convolution.BaseConv", "kernel_sizes": 3},
    "alt_mixer": {"_target_": MIXER + "linear_attention.LinearAttention", "feature_dim": F, "num_heads": H},
    "alt_mixer_2": {"_target_": "src.models.mixers.slide_fa2.SlidingsMHA", "window_size": 9, "num_heads": 99},
    "alt_mixer_layers": [1],
    "alt_mixer_2_layers": [2],
}


def tensors(decay: bool = False) -> dict[str, Tensor]:
    """BaseConv, linear, sliding: the official names."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    found = {"transformer.embeddings.word_embeddings.weight": draw(ROWS, D), "transformer.ln_f.weight": draw(D)}
    found["lm_head.weight"] = found["transformer.embeddings.word_embeddings.weight"].clone()
    for i in range(3):
        block = {
            "norm1.weight": draw(D),
            "norm2.weight": draw(D),
            "mlp.fc1.weight": draw(2 * M, D),
            "mlp.fc2.weight": draw(D, M),
        }
        found |= {f"transformer.layers.{i}.{name}": t for name, t in block.items()}
    conv = {"in_proj.weight": draw(4 * D, D), "in_proj.bias": draw(4 * D), "conv.conv.weight": draw(2 * D, 1, 3)}
    conv |= {"out_proj.weight": draw(D, 2 * D), "out_proj.bias": draw(D)}
    linear = {
        "proj_q.weight": draw(H * F, D),
        "proj_k.weight": draw(H * F, D),
        "proj_v.weight": draw(D, D),
        "out_proj.weight": draw(D, D),
    }
    if decay:
        linear["decay_proj.weight"] = draw(H, D)
    sliding = {"Wqkv.weight": draw(3 * D, D), "out_proj.weight": draw(D, D)}
    for i, mixer in enumerate((conv, linear, sliding)):
        found |= {f"transformer.layers.{i}.mixer.{name}": t for name, t in mixer.items()}
    return found


def folder(place: Path, weights: dict[str, Tensor], settings: dict[str, Any] | None = None, safe: bool = True) -> Path:
    place.mkdir()
    (place / "config.json").write_text(json.dumps(settings or SETTINGS))
    if safe:
        save_file(weights, place / "model.safetensors")
    else:
        torch.save(weights, place / "pytorch_model.bin")
    return place


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_layers_options_and_parts(tmp_path: Path, safe: bool) -> None:
    weights = tensors()
    made = import_folder(folder(tmp_path / "in", weights, safe=safe), tmp_path / "out")
    config = made.config
    assert config.layer_types == ("base_conv", "based", "sliding") and config.tie_embeddings and config.residual_fp32
    assert config.layer_options["sliding"] == {"window": 4, "rotary_fraction": 1.0}, "9 is halved, downwards"
    assert (config.mlp_width, config.norm, config.norm_eps, config.vocab_size) == (M, "rmsnorm", 1e-5, ROWS)
    ours = read_full_weights(made.checkpoint)
    fc1 = weights["transformer.layers.0.mlp.fc1.weight"]
    assert torch.equal(ours["model.layers.0.channel_mixer.l2.weight"], fc1[:M]), "the upper half multiplies"
    assert torch.equal(ours["model.layers.0.channel_mixer.l1.weight"], fc1[M:]), "the lower half is the gate"
    joined = torch.cat([ours[f"model.layers.2.token_mixer.{p}_proj.weight"] for p in "qkv"])
    assert torch.equal(joined, weights["transformer.layers.2.mixer.Wqkv.weight"])
    bias = weights["transformer.layers.0.mixer.in_proj.bias"]
    assert torch.equal(ours["model.layers.0.token_mixer.conv_proj.bias"], bias[: 2 * D])
    said = "; ".join(made.notes)
    assert "halved" in said and "1 based" in said and "37" in said


def test_old_names_prefix_and_counters(tmp_path: Path) -> None:
    old = {f"model.{n}".replace("conv.conv", "conv1.conv"): t for n, t in tensors().items()}
    old["train_metrics.num-tokens.count"] = torch.tensor(7)
    made = import_folder(folder(tmp_path / "in", old), tmp_path / "out")
    said = "; ".join(made.notes)
    assert "conv1" in said and "1 counters" in said
    plain = import_folder(folder(tmp_path / "plain", tensors()), tmp_path / "plain_out")
    one, two = read_full_weights(made.checkpoint), read_full_weights(plain.checkpoint)
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_decay_is_read_from_the_tensors_and_checked(tmp_path: Path) -> None:
    rates = torch.log1p(-torch.exp2(-3.0 - torch.arange(H)))
    inert = {**tensors(), "transformer.decay.decay": rates}
    made = import_folder(folder(tmp_path / "inert", inert, {**SETTINGS, "fixed_decay": True}), tmp_path / "o1")
    assert "decay" not in made.config.layer_options["based"] and any("no effect" in note for note in made.notes)
    made = import_folder(folder(tmp_path / "at_work", {**tensors(True), "transformer.decay.decay": rates}), tmp_path / "o2")
    assert made.config.layer_options["based"]["decay"] is True
    with pytest.raises(ExportError, match="decay rates"):
        import_folder(folder(tmp_path / "other", {**tensors(True), "transformer.decay.decay": rates * 2}), tmp_path / "o3")
    with pytest.raises(ExportError, match="decay_denom"):
        import_folder(folder(tmp_path / "denom", tensors(True), {**SETTINGS, "decay_denom": True}), tmp_path / "o4")


def test_untied_output_matrix(tmp_path: Path) -> None:
    weights = tensors()
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    assert not import_folder(folder(tmp_path / "in", weights), tmp_path / "out").config.tie_embeddings


@pytest.mark.parametrize(
    ("change", "settings", "word"),
    [
        ({"transformer.layers.1.mixer.g_norm.weight": torch.ones(8)}, {}, "ThunderKittens"),
        ({"transformer.layers.0.mixer.conv.conv.weight": None}, {}, "no convolution"),
        ({"transformer.layers.1.mixer.proj_q.weight": None}, {}, "no mixer we know"),
        ({"transformer.ln_f.weight": None}, {}, "hold no"),
        ({"transformer.surprise": torch.ones(2)}, {}, "more than this layout"),
        ({}, {"alt_mixer": {**SETTINGS["alt_mixer"], "feature_dim": 5}}, "do not make"),
        ({"transformer.layers.1.mixer.proj_v.weight": torch.ones(D, D + 1)}, {}, "do not fit"),
    ],
)
def test_refusals(tmp_path: Path, change: dict[str, Any], settings: dict[str, Any], word: str) -> None:
    weights = {name: t for name, t in {**tensors(), **change}.items() if t is not None}
    with pytest.raises(ExportError, match=word):
        import_folder(folder(tmp_path / "in", weights, {**SETTINGS, **settings}), tmp_path / "out")


def test_recognition() -> None:
    assert is_released(SETTINGS) and is_released({**SETTINGS, "model_type": "gpt2"}) and is_released({"ssm_cfg": {}})
    assert not is_released({"model_type": "gpt2", "n_embd": 768}) and not is_released({**SETTINGS, "model_type": "llama"})


@pytest.mark.parametrize("change", [{}, {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False, "expand": 3}])
def test_mamba_of_transformers(change: dict[str, Any], tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 4,
        "layer_norm_epsilon": 1e-3,
    }
    torch.manual_seed(0)
    theirs = MambaForCausalLM(MambaConfig(**sizes, **change)).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.add_(torch.randn_like(p) * (0.2 if p.dim() > 1 else 0.1)).mul_(0.5 if "A_log" in name else 1.0)
    theirs.save_pretrained(tmp_path / "mamba")
    made = import_folder(tmp_path / "mamba", tmp_path / "ours")
    assert made.config.num_heads == 1, "it has none, so none are made up"
    tokens = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        want, got = theirs(tokens).logits, load_model(made.checkpoint)[0](tokens)[0]
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    settings = json.loads((tmp_path / "mamba" / "config.json").read_text()) | {"hidden_act": "relu"}
    (tmp_path / "mamba" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ExportError, match="activation 'relu'"):
        import_folder(tmp_path / "mamba", tmp_path / "other")
