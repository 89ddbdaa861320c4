"""Exported folders: what lies in them, that any model of ours fits, and that a wrong one is never kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from megatron.checkpoint.load import read_full_weights
from megatron.data.tokenizers import build_tokenizer
from megatron.errors import CheckpointError, ExportError
from megatron.export import hf, verify
from megatron.export.hf import export_checkpoint
from megatron.interop.import_hf import import_folder

Make = Callable[..., Path]


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def test_metala_folder(make_checkpoint: Make, tmp_path: Path) -> None:
    facts = {"tokenizer": {"vocab_size": 64, "eod": 3, "pad": 4}, "data": "a test", "run": {"peak learning rate": 1e-3}}
    made = export_checkpoint(make_checkpoint(facts=facts), tmp_path / "hf")
    config = read(made.folder)
    assert made.family == "metala" and config["model_type"] == "metala"
    assert (config["decoder_embed_dim"], config["decoder_layers"], config["decoder_attention_heads"]) == (32, 2, 2)
    assert (config["glu_dim"], config["eos_token_id"], config["pad_token_id"]) == (48, 3, 4)
    assert config["tie_word_embeddings"] is True and config["dtype"] == "float32"
    weights = load_file(made.folder / "model.safetensors")
    assert "lm_head.weight" not in weights and "model.layers.1.token_mixer.k_gate.weight" in weights
    card = (made.folder / "README.md").read_text()
    for fact in ("| optimizer steps | 7 |", "| tokens | 4,096 |", "| data | a test |", "| peak learning rate | 0.001 |"):
        assert fact in card
    assert json.loads((made.folder / "generation_config.json").read_text())["eos_token_id"] == 3
    assert not list(tmp_path.glob(".*.tmp")) and not list(made.folder.glob("__pycache__"))
    base = AutoModel.from_pretrained(made.folder, trust_remote_code=True)
    full = load(made.folder)
    tokens = torch.randint(0, 64, (1, 9))
    assert torch.equal(full.lm_head(base(tokens).last_hidden_state), full(tokens).logits)
    assert full.lm_head.weight is full.model.embed_tokens.weight


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "rmsnorm", "tie_embeddings": False},
        {"norm": "non_parametric_layernorm", "mlp": "plain", "activation": "gelu", "mlp_bias": True},
        {"activation": "mish", "embedding_scale": True, "layer_options": {"metala": {"conv_width": 3}}},
    ],
)
def test_any_model_exports_and_comes_back(make_checkpoint: Make, tmp_path: Path, changes: dict[str, Any]) -> None:
    checkpoint = make_checkpoint(**changes)
    made = export_checkpoint(checkpoint, tmp_path / "hf")
    assert made.family == "linear_lm" and made.difference <= verify.TOLERANCE
    tokens = torch.randint(0, 64, (2, 5))
    assert load(made.folder).generate(tokens, max_new_tokens=3, do_sample=False).shape == (2, 8)
    back = import_folder(made.folder, tmp_path / "again")
    old, new = read_full_weights(checkpoint), read_full_weights(back.checkpoint)
    assert set(old) == set(new) and all(torch.equal(old[n], new[n]) for n in old)
    assert all(getattr(back.config, name) == value for name, value in changes.items())


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "layernorm", "norm_eps": 1e-5, "mlp_bias": True, "tie_embeddings": False, "embedding_scale": True},
        {"norm_eps": 3e-6, "activation": "gelu", "layer_options": {"metala": {"gate_round": "bf16"}}},
    ],
)
def test_official_fields_carry_the_choices(make_checkpoint: Make, tmp_path: Path, changes: dict[str, Any]) -> None:
    made = export_checkpoint(make_checkpoint(**changes), tmp_path / "hf")
    back = import_folder(made.folder, tmp_path / "again")
    assert made.family == "metala"
    assert all(getattr(back.config, name) == value for name, value in changes.items())


def test_padding_rows_are_cut(make_checkpoint: Make, tmp_path: Path) -> None:
    facts = {"tokenizer": {"vocab_size": 50, "eod": 0, "pad": 1}}
    for tied in (True, False):
        checkpoint = make_checkpoint(facts=facts, tie_embeddings=tied, name=f"run{tied}")
        made = export_checkpoint(checkpoint, tmp_path / f"hf{tied}")
        assert read(made.folder)["vocab_size"] == 50
        assert any("14 rows" in note and "cut off" in note for note in made.notes)
        full = read_full_weights(checkpoint)
        for name, value in load_file(made.folder / "model.safetensors").items():
            assert torch.equal(value, full[name][: len(value)])
        kept = export_checkpoint(checkpoint, tmp_path / f"kept{tied}", keep_padding=True)
        assert read(kept.folder)["vocab_size"] == 64


def test_a_padding_token_has_a_row(make_checkpoint: Make, tmp_path: Path) -> None:
    """Reading a tokenizer without a padding token adds one; a model with a row for each id of the file has none for it."""
    words = {word: number for number, word in enumerate(["<|endoftext|>", "a", "b", "c"])}
    backend = Backend(WordLevel(words, unk_token="<|endoftext|>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens(["<|endoftext|>"])
    folder = tmp_path / "their tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder)
    read_again = build_tokenizer("HFGPT2Tokenizer", folder)
    assert (read_again.vocab_size, read_again.pad) == (5, 4), "training counts the padding token that it added"
    facts = {"tokenizer": {"type": "HFGPT2Tokenizer", "vocab_size": 5, "eod": 0, "pad": 4}}
    checkpoint = make_checkpoint(facts=facts, vocab_size=4, tokenizer={path.name: path for path in folder.iterdir()})
    made = export_checkpoint(checkpoint, tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(made.folder)
    batch = tokenizer(["a b c", "a"], padding=True, return_tensors="pt")
    assert int(batch["input_ids"].max()) < read(made.folder)["vocab_size"] == 4
    assert tokenizer.pad_token == "<|endoftext|>" and "4 ids" in "".join(made.notes)
    new = load(made.folder).generate(**batch, max_new_tokens=2, do_sample=False)
    assert new.shape == (2, 5)


def test_shards_and_dtype(make_checkpoint: Make, tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    made = export_checkpoint(checkpoint, tmp_path / "hf", dtype="bfloat16", max_shard_bytes=8_000)
    index = json.loads((made.folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and all((made.folder / name).is_file() for name in files)
    assert sum((made.folder / name).stat().st_size for name in files) > index["metadata"]["total_size"]
    model = load(made.folder)
    assert model.dtype == torch.bfloat16 and read(made.folder)["dtype"] == "bfloat16"
    for name, value in read_full_weights(checkpoint).items():
        assert torch.equal(model.get_parameter(name), value.to(torch.bfloat16))


def test_half_precision_checkpoint_keeps_its_dtype(make_checkpoint: Make, tmp_path: Path) -> None:
    made = export_checkpoint(make_checkpoint(dtype=torch.bfloat16), tmp_path / "hf")
    assert read(made.folder)["dtype"] == "bfloat16"
    assert AutoConfig.from_pretrained(made.folder, trust_remote_code=True).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("right", "wrong", "what"),
    [
        ("TAU = 16.0", "TAU = 15.0", "whole pass"),
        ("held.states, held.seen = new + tail, held.seen", "held.seen = held.seen", "steps through the cache"),
        ("return None if all_shown else shown", "return None", "left padding"),
    ],
)
def test_a_folder_that_differs_is_removed(
    make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str, what: str
) -> None:
    """A packed file that computes something else (here: spoilt on purpose) never becomes a folder."""
    original = hf.packed_sources

    def spoil(*arguments: Any) -> dict[str, str]:
        sources = original(*arguments)
        name = next(n for n in sources if n.startswith("modeling"))
        assert right in sources[name]
        return sources | {name: sources[name].replace(right, wrong)}

    monkeypatch.setattr(hf, "packed_sources", spoil)
    with pytest.raises(ExportError, match="other logits") as caught:
        export_checkpoint(make_checkpoint(), tmp_path / "hf")
    assert what in str(caught.value)
    assert not (tmp_path / "hf").exists() and not list(tmp_path.glob(".hf*"))


def test_bad_arguments(make_checkpoint: Make, tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(ExportError, match="exists already"):
        export_checkpoint(checkpoint, tmp_path / "full")
    with pytest.raises(ExportError, match="unknown dtype"):
        export_checkpoint(checkpoint, tmp_path / "hf", dtype="int3")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        export_checkpoint(tmp_path / "nowhere", tmp_path / "hf")
    damaged = next(checkpoint.glob("layer_02*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="damaged"):
        export_checkpoint(checkpoint, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
