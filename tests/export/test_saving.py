"""Saving an exported model of every family and loading it again: whole, in shards, as a pickle, by AutoModel."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig

from tests.export.families import FAMILIES, TOKENS

Load = Callable[..., Any]


@pytest.mark.parametrize("shard", ["1GB", "20KB"], ids=["whole", "shards"])
@torch.inference_mode()
def test_save_and_load(load: Load, family: str, tmp_path: Path, shard: str) -> None:
    """Twice in a row: the second folder is made from the first one's code."""
    model = load()
    want, greedy = model(TOKENS).logits, model.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name, max_shard_size=shard)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=True).eval()
        assert (tmp_path / name / "model.safetensors.index.json").is_file() is (shard == "20KB")
        assert torch.equal(model(TOKENS).logits, want)
        assert torch.equal(model.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0), greedy)
    tied = FAMILIES[family].tie_embeddings
    assert json.loads((tmp_path / "second" / "config.json").read_text())["tie_word_embeddings"] is tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    GenerationConfig.from_pretrained(tmp_path / "second")


@torch.inference_mode()
def test_base_model(load: Load, folder: Path) -> None:
    """`AutoModel` loads the same model without its head."""
    base, full = AutoModel.from_pretrained(folder, trust_remote_code=True).eval(), load()
    assert torch.equal(full.lm_head(base(TOKENS).last_hidden_state), full(TOKENS).logits)


def test_state_dict(load: Load) -> None:
    """A pickled state dict fits a fresh model."""
    model, other, file = load(), load(), io.BytesIO()
    torch.save(model.state_dict(), file)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@torch.inference_mode()
def test_half_precision(load: Load, folder: Path, dtype: torch.dtype) -> None:
    """Loaded in half precision: logits of that type near those in fp32, and texts."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()
    got, want = model(TOKENS).logits, load()(TOKENS).logits
    assert got.dtype == dtype
    assert float((got.float() - want).abs().max() / want.abs().max()) < (0.1 if dtype == torch.bfloat16 else 0.02)
    assert model.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None).shape == (2, 16)
