"""Softmax models as GPT-NeoX writes them, made here by its rules, read back as our weights; both commands that do it."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train
from megatron import assemble
from megatron.checkpoint.load import read_full_weights
from megatron.errors import CheckpointError
from megatron.interop.neox import read_neox_weights
from megatron.model.config import ModelConfig
from megatron.recipe import model_keys
from tests.commands import run_here
from tests.export.conftest import random_weights
from tools.checkpoint import import_neox, make_parser

ROOT = Path(__file__).resolve().parents[2]
PYTHIA = ModelConfig(
    96, 32, 2, 4, 48, ("global", "global"), {"global": {"positions": "rotary", "bias": True}}, norm="layernorm", mlp="plain",
    activation="gelu", mlp_bias=True, parallel_residual=True, tie_embeddings=False,
)  # fmt: skip
LLAMA = replace(
    PYTHIA, layer_options={"global": {"positions": "rotary", "kv_heads": 4}}, num_heads=8, norm="rmsnorm", mlp="gated",
    activation="silu", mlp_bias=False, parallel_residual=False,
)  # fmt: skip
LEARNED = replace(PYTHIA, learned_positions=16, parallel_residual=False, tie_embeddings=True)
MODELS = {"pythia": PYTHIA, "llama": LLAMA, "gpt2": LEARNED}


def fused(w: dict[str, Tensor], leaf: str, config: ModelConfig, rank: int, size: int) -> Tensor:
    """One rank's query_key_value, written by loops over heads."""
    width = config.hidden_size // config.num_heads
    q, k, v = (w[f"token_mixer.{p}_proj.{leaf}"].unflatten(0, (-1, width)) for p in "qkv")

    def mine(t: Tensor) -> list[Tensor]:
        share = len(t) // size
        return list(t[rank * share : (rank + 1) * share])

    if len(q) == len(k):
        return torch.cat([part for head in zip(mine(q), mine(k), mine(v), strict=True) for part in head])
    return torch.cat([*mine(q), *mine(k), *mine(v)])


def block_file(w: dict[str, Tensor], config: ModelConfig, rank: int, size: int) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for ours, theirs in (("token_norm", "input_layernorm"), ("channel_norm", "post_attention_layernorm")):
        out[f"{theirs}.{'scale' if config.norm == 'rmsnorm' else 'weight'}"] = w[f"{ours}.weight"]
        if f"{ours}.bias" in w:
            out[f"{theirs}.bias"] = w[f"{ours}.bias"]
    for leaf in ("weight", "bias"):
        if f"token_mixer.q_proj.{leaf}" in w:
            out[f"attention.query_key_value.{leaf}"] = fused(w, leaf, config, rank, size)
    first = w["channel_mixer.l1.weight"].chunk(size)[rank]
    out["mlp.linear1.weight"] = (
        torch.cat([w["channel_mixer.l2.weight"].chunk(size)[rank], first]) if config.mlp == "gated" else first
    )
    if "channel_mixer.l1.bias" in w:
        out["mlp.linear1.bias"] = w["channel_mixer.l1.bias"].chunk(size)[rank]
    for ours, theirs in (("token_mixer.out_proj", "attention.dense"), ("channel_mixer.l3", "mlp.linear2")):
        out[f"{theirs}.weight"] = w[f"{ours}.weight"].chunk(size, dim=1)[rank]
        if f"{ours}.bias" in w:
            # in parallel blocks every rank adds its part before the sum: here rank 0 has three times the rest, with signs
            part = [3.0, -1.0, -0.5, -0.5] if size == 4 else [3.0, -2.0] if size == 2 else [1.0]
            out[f"{theirs}.bias"] = w[f"{ours}.bias"] * (part[rank] if config.parallel_residual else 1.0)
    out["attention.rotary_emb.inv_freq"] = torch.ones(4)
    return out


def write_neox(folder: Path, weights: dict[str, Tensor], config: ModelConfig, size: int) -> None:
    folder.mkdir(parents=True)
    for rank in range(size):
        files = {0: {"word_embeddings.weight": weights["model.embed_tokens.weight"].chunk(size)[rank]}}
        if config.learned_positions:
            files[0]["position_embeddings.weight"] = weights["model.embed_tokens.positions"]
        for i in range(config.num_layers):
            stem = f"model.layers.{i}."
            own = {name.removeprefix(stem): t for name, t in weights.items() if name.startswith(stem)}
            files[i + 2] = block_file(own, config, rank, size)
        gain = "scale" if config.norm == "rmsnorm" else "weight"
        files[config.num_layers + 3] = {f"norm.{gain}": weights["model.final_norm.weight"]}
        if "model.final_norm.bias" in weights:
            files[config.num_layers + 3]["norm.bias"] = weights["model.final_norm.bias"]
        head = weights.get("lm_head.weight")
        last = {"word_embeddings.weight": files[0]["word_embeddings.weight"]}
        files[config.num_layers + 4] = last if head is None else {"final_linear.weight": head.chunk(size)[rank]}
        for index, content in files.items():
            torch.save(
                {n: t.clone() for n, t in content.items()}, folder / f"layer_{index:02d}-model_{rank:02d}-model_states.pt"
            )


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_any_tensor_parallel_size(name: str, size: int, tmp_path: Path) -> None:
    config = MODELS[name]
    weights = random_weights(config)
    write_neox(tmp_path / "global_step7", weights, config, size)
    found = read_neox_weights(tmp_path / "global_step7", config)
    assert set(found) == set(weights)
    for key, want in weights.items():
        assert (found[key] - want).abs().max() <= 1e-6, key  # sums of bias parts round


def test_a_run_without_pipeline(tmp_path: Path) -> None:
    """One file per rank with `sequential.N.` names."""
    weights = random_weights(PYTHIA)
    write_neox(tmp_path / "layers", weights, PYTHIA, 2)
    (tmp_path / "flat").mkdir()
    for rank in range(2):
        merged = {}
        for path in sorted((tmp_path / "layers").glob(f"layer_*-model_{rank:02d}-*")):
            index = int(path.name[6:8])
            part = torch.load(path, weights_only=True)
            merged |= {f"sequential.{index}.{n}": t for n, t in part.items()}
        torch.save(merged, tmp_path / "flat" / f"mp_rank_{rank:02d}_model_states.pt")
    found = read_neox_weights(tmp_path / "flat", PYTHIA)
    assert all((found[n] - t).abs().max() <= 1e-6 for n, t in weights.items())


def test_norms_that_drifted_apart_are_averaged(tmp_path: Path) -> None:
    weights = random_weights(PYTHIA)
    write_neox(tmp_path / "a", weights, PYTHIA, 2)
    file = tmp_path / "a" / "layer_02-model_01-model_states.pt"
    part = torch.load(file, weights_only=True)
    part["input_layernorm.weight"] += 1e-3
    torch.save(part, file)
    found = read_neox_weights(tmp_path / "a", PYTHIA)["model.layers.0.token_norm.weight"]
    assert (found - weights["model.layers.0.token_norm.weight"] - 5e-4).abs().max() < 1e-6


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a GPT-NeoX checkpoint"):
        read_neox_weights(tmp_path, PYTHIA)
    write_neox(tmp_path / "a", random_weights(PYTHIA), PYTHIA, 2)
    for change, said in (
        ({"mlp_width": 96}, "has another size"),
        ({"num_heads": 3, "hidden_size": 48}, "another size"),
        (
            {"layer_options": {"global": {"positions": "rotary", "bias": True, "kv_heads": 2}}},
            "cannot be taken out of 'attention.query_key_value",
        ),
        ({"embedding_norm": True}, "GPT-NeoX has none for"),
        ({"mlp": "gated", "mlp_width": 24}, "l3.weight' cannot be joined"),
        ({"layer_options": {"global": {"positions": "rotary", "bias": True, "qk_norm": True}}}, "q_norm' is not in"),
    ):
        with pytest.raises(CheckpointError, match=said):
            read_neox_weights(tmp_path / "a", replace(PYTHIA, **change))
    (tmp_path / "a" / "layer_02-model_01-model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="files of the checkpoint are missing"):
        read_neox_weights(tmp_path / "a", PYTHIA)


VALUES = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "intermediate_size": 48,
    "pos_emb": "rotary", "gpt_j_residual": True, "no_weight_tying": True, "train_iters": 1, "model_parallel_size": 2,
    "train_batch_size": 64, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 4,
    "tokenizer_type": "CharLevelTokenizer",
}  # fmt: skip


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return run_here(*words)


@pytest.mark.slow
def test_both_commands_write_the_same(tmp_path: Path) -> None:
    """Weights, and a YAML that a trainer takes."""
    config = replace(PYTHIA, vocab_size=512)
    weights, folder, yml = random_weights(config), tmp_path / "global_step7", tmp_path / "run.yml"
    write_neox(folder, weights, config, 2)
    yml.write_text(json.dumps(VALUES))
    new = command("tools/checkpoint.py", "import", folder, yml, "--output", tmp_path / "new")
    old = command("tools/convert_from_neox.py", "--input", folder, "--config", yml, "--output", tmp_path / "old")
    for done, place in ((new, tmp_path / "new"), (old, tmp_path / "old")):
        assert done.returncode == 0, done.stderr
        found = read_full_weights(place / "global_step7")
        assert set(found) == set(weights) and all((found[n] - t).abs().max() <= 1e-6 for n, t in weights.items())
        assert f"python deepy.py train.py {place / 'continue.yml'}" in done.stdout
        assert 'tokenizer_type: "CharLevelTokenizer"' in (place / "continue.yml").read_text()
    none = command("tools/checkpoint.py", "import", folder, "--output", tmp_path / "none")
    assert none.returncode == 4 and "YAML files are not known" in none.stderr and "Traceback" not in none.stderr


@pytest.mark.parametrize("name", MODELS)
def test_weights_train_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Learned positions, rotary and grouped heads: imported, and taken by the trainer."""
    monkeypatch.setattr(assemble, "plot_metrics", lambda *_: "not drawn here")
    config = replace(MODELS[name], vocab_size=512)
    write_neox(tmp_path / "global_step7", random_weights(config), config, 2)
    keys = model_keys(config) | {"seq_length": 16, "tokenizer_type": "CharLevelTokenizer"}
    (tmp_path / "run.yml").write_text(json.dumps(keys))
    (tmp_path / "text.jsonl").write_text('{"text": "the cat sat on the mat"}\n' * 40)
    words = ["import", str(tmp_path / "global_step7"), str(tmp_path / "run.yml"), "--output", str(tmp_path / "out")]
    assert import_neox(make_parser().parse_args(words)) == 0
    assert "train_stream=[TEXT.jsonl]" in capsys.readouterr().out
    sets = ("train_iters=1", "seq_length=16", f"train_stream=[{tmp_path / 'text.jsonl'}]")
    assert train.main([str(tmp_path / "out" / "continue.yml"), *(word for item in sets for word in ("--set", item))]) == 0
    assert (tmp_path / "out-continued" / "checkpoints" / "global_step1" / "manifest.json").is_file()
