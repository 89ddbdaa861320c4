"""`resize_token_embeddings` on every family: grown and shrunk, tied and untied, trained afterwards, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.export.families import FAMILIES, TOKENS

Load = Callable[..., Any]
NEW = torch.tensor([[5, 66, 69, 7]])
"""With tokens that the grown vocabulary alone has."""


def sizes(model: Any) -> set[int]:
    """All places that say how large the vocabulary is."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    matrices = {len(embedding.weight), len(head.weight), embedding.num_embeddings, head.out_features}
    return matrices | {model.config.vocab_size, model.vocab_size if hasattr(model, "vocab_size") else model.config.vocab_size}


@pytest.mark.parametrize("options", [{}, {"mean_resizing": False}], ids=["default", "no_mean"])
def test_grow(load: Load, family: str, options: dict[str, Any]) -> None:
    """Old tokens keep their logits; new ones can be read, trained and generated; a tie stays."""
    model = load(torch.float64)
    want = model(TOKENS).logits.detach()
    resized = model.resize_token_embeddings(70, **options)
    assert resized is model.get_input_embeddings() and sizes(model) == {70}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is FAMILIES[family].tie_embeddings
    assert torch.allclose(model(TOKENS).logits[..., :64], want, atol=1e-9)
    model.train()(NEW, labels=NEW).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, name
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    made = model.eval().generate(NEW, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert made.shape == (1, 7)


def test_after_a_backward_pass(load: Load) -> None:
    """Graphs that are alive know the old size; they do not break the new one."""
    model = load()
    loss = model.train()(TOKENS, labels=TOKENS).loss
    loss.backward()
    model.resize_token_embeddings(70)
    model.zero_grad()
    model(NEW, labels=NEW).loss.backward()
    assert model.get_input_embeddings().weight.grad.shape == (70, 32)


def test_shrink(load: Load, family: str) -> None:
    """Down to fewer rows and, after growing, back: logits of the rows that stay are the same."""
    model = load(torch.float64)
    tokens = TOKENS.clamp_max(49)
    want = model(tokens).logits.detach()
    model.resize_token_embeddings(50)
    assert sizes(model) == {50}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is FAMILIES[family].tie_embeddings
    assert torch.allclose(model(tokens).logits, want[..., :50], atol=1e-9)
    model(tokens, labels=tokens).loss.backward()


def test_pad_to_multiple_of(load: Load) -> None:
    model = load()
    model.resize_token_embeddings(70, pad_to_multiple_of=16)
    assert sizes(model) == {80} and model(TOKENS).logits.shape[-1] == 80
    model.resize_token_embeddings(pad_to_multiple_of=64)
    assert sizes(model) == {128} and model(TOKENS).logits.shape[-1] == 128


def test_resized_is_saved_and_loaded(load: Load, family: str, tmp_path: Path) -> None:
    model = load()
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path / "resized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "resized", trust_remote_code=True).eval()
    assert sizes(again) == {70} and torch.equal(again(NEW).logits, model(NEW).logits)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is FAMILIES[family].tie_embeddings
    again.resize_token_embeddings(64)
    assert torch.allclose(again(TOKENS).logits, load()(TOKENS).logits, atol=1e-5)


def test_the_base_model_resizes(load: Load) -> None:
    """Without a head, as `AutoModel` gives it."""
    model = load().model
    want = model(TOKENS).last_hidden_state
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70 and len(model.get_input_embeddings().weight) == 70
    assert torch.equal(model(TOKENS).last_hidden_state, want)
    assert bool(torch.isfinite(model(NEW).last_hidden_state).all())
