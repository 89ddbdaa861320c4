"""Weights that came in train on: import, the YAML that came with them, two steps, export, import again, for every family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import train
from megatron import assemble
from megatron.checkpoint.find import newest_checkpoint
from megatron.checkpoint.load import read_full_weights
from megatron.checkpoint.save import save_weights
from megatron.config.load import load_config
from megatron.errors import CheckpointError
from megatron.export.hf import export_checkpoint
from megatron.interop.import_hf import import_folder
from megatron.model.build import param_specs
from megatron.model.config import ModelConfig
from megatron.model.resolved import resolved
from megatron.recipe import start_of, write_recipe
from tests.export.families import FAMILIES, family_weights
from tests.interop import test_released

ROWS = 512  # of the byte vocabulary
SMALL = {"vocab_size": ROWS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
THEIRS: dict[str, dict[str, Any]] = {
    "gpt_neox": {"intermediate_size": 48, "rotary_pct": 0.5},
    "gpt_neox sequential": {
        "intermediate_size": 48,
        "use_parallel_residual": False,
        "attention_bias": False,
        "rotary_pct": 1.0,
    },
    "llama": {"intermediate_size": 48, "rope_theta": 5e5},
    "llama grouped": {"intermediate_size": 48, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "mistral": {"intermediate_size": 48, "num_key_value_heads": 2, "sliding_window": 7},
    "bloom": {},
    "mpt": {"learned_pos_emb": False},
    "mamba": {"state_size": 4},
}
OURS = ("our metala", "our jrt", "our hybrid")
QUICK = ("mistral", "mpt")


def transformers_folder(name: str, place: Path) -> Path:
    """What transformers itself writes."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name.split()[0], **{**SMALL, **THEIRS[name]})
    AutoModelForCausalLM.from_config(config).save_pretrained(place)
    return place


def exported_folder(name: str, place: Path) -> Path:
    """What we export: MetaLA's official layout, or our own."""
    config = ModelConfig.from_dict({**FAMILIES[name.removeprefix("our ")].to_dict(), "vocab_size": ROWS})
    weights = {n: t * 0.1 if t.dim() > 1 else t for n, t in family_weights(config).items()}
    made = save_weights(place / "first", weights, param_specs(config), model_config=config.to_dict(), facts={})
    return export_checkpoint(made, place / "hf").folder


def released_folder(name: str, place: Path) -> Path:
    """The layout of the released Based models."""
    place.mkdir()
    weights = {n: t * 0.1 if t.dim() > 1 else t for n, t in test_released.tensors().items()}
    table = torch.randn(ROWS, test_released.D) * 0.1
    weights |= {"transformer.embeddings.word_embeddings.weight": table, "lm_head.weight": table.clone()}
    (place / "config.json").write_text(json.dumps(test_released.SETTINGS))
    save_file({n: t.contiguous() for n, t in weights.items()}, place / "model.safetensors")
    return place


CASES: dict[str, Callable[[str, Path], Path]] = {
    **dict.fromkeys(THEIRS, transformers_folder),
    **dict.fromkeys(OURS, exported_folder),
    "released based": released_folder,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little text."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [json.dumps({"text": f"{i} the cat sat on the mat. " * 4}) for i in range(40)]
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES])
def test_import_train_export_import(name: str, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "plot_metrics", lambda *_: "not drawn here")
    folder = CASES[name](name, tmp_path / "theirs")
    made = import_folder(folder, tmp_path / "in" / "checkpoints")
    recipe = write_recipe(start_of(made.checkpoint, made.config, name, str(text)))
    assert recipe == tmp_path / "in" / "checkpoints" / "continue.yml"
    run = load_config([recipe], world_size=1)
    assert run.checkpoint.finetune and run.checkpoint.load == str(recipe.parent)
    if name == "mistral":
        words = ("--set", "train_iters=2", "--set", "hidden_size=64", "--set", "tokenizer_type=CharLevelTokenizer")
        with pytest.raises(CheckpointError, match=f"hidden_size is 32(.|\n)*model section of {recipe}"):
            train.main([str(recipe), *words])
    sets = ("train_iters=2", "seq_length=24", "tokenizer_type=CharLevelTokenizer", "optimizer.params.lr=0.01")
    assert train.main([str(recipe), *(word for item in sets for word in ("--set", item))]) == 0
    after = newest_checkpoint(tmp_path / "in" / "continued")
    assert after.name == "global_step2"
    before, trained = read_full_weights(made.checkpoint), read_full_weights(after)
    assert set(before) == set(trained) and not torch.equal(
        before["model.embed_tokens.weight"], trained["model.embed_tokens.weight"]
    )
    assert all((before[n] - trained[n]).abs().max() < 0.1 for n in before), "it started from other weights"
    out = export_checkpoint(after, tmp_path / "out")
    said, kept = (json.loads((place / "config.json").read_text()) for place in (folder, out.folder))
    for key in ("max_position_embeddings", "max_seq_len"):
        assert said.get(key) == kept.get(key) or name.startswith("our"), f"the length {key} is not that of the original"
    again = import_folder(out.folder, tmp_path / "again")
    assert resolved(again.config) == resolved(made.config)
    back = read_full_weights(again.checkpoint)
    assert set(back) == set(trained) and all(torch.equal(back[n], trained[n]) for n in back)
