"""PEFT on every family: LoRA on any module trains every tensor and acts alike in prefill, in steps and when merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.export.families import BATCH, FAMILIES, MASK, TOKENS

peft = pytest.importorskip("peft")

Load = Callable[..., Any]
TARGETS: Mapping[str, Mapping[str, Any]] = {
    "all_linear": {"target_modules": "all-linear"},
    "output_projection": {"target_modules": ["out_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "out_proj"]},
    "head": {"target_modules": ["lm_head", "out_proj"]},
    "embedding_and_head": {"target_modules": ["embed_tokens", "lm_head"]},
    "modules_to_save": {"target_modules": "all-linear", "modules_to_save": ["embed_tokens", "lm_head"]},
}
SHARED = ("embedding", "head", "embedding_and_head")
"""Targets that PEFT cannot merge where embedding and head share one matrix, of any model: it changes both, and warns."""


def adapted(model: Any, targets: str) -> Any:
    """The model with adapters whose values are random, so that they act before they are trained."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **TARGETS[targets])
    return peft.get_peft_model(model, config)


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("targets", TARGETS)
def test_lora(load: Load, family: str, targets: str) -> None:
    """Every tensor of an adapter gets a gradient; merged is unmerged; steps through the cache are the whole pass."""
    model = adapted(load(torch.float64), targets)
    plain = logits(load(torch.float64))
    model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    for name, parameter in trained.items():
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, name
    whole = logits(model)
    assert float((whole - plain).abs().max()) > 1e-3
    cache, parts = None, []
    with torch.inference_mode():
        for start, stop in ((0, 8), *((i, i + 1) for i in range(8, 12))):
            out = model(input_ids=TOKENS[:, start:stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-8)
    if targets not in SHARED or not FAMILIES[family].tie_embeddings:
        assert torch.allclose(logits(model.merge_and_unload()), whole, atol=1e-8)


def test_lora_generates(load: Load) -> None:
    """With the cache as without, batch left-padded, switched off as without an adapter."""
    model = adapted(load(torch.float64), "all_linear").eval()
    options = {"attention_mask": MASK, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    made = model.generate(input_ids=BATCH, **options)
    assert torch.equal(made, model.generate(input_ids=BATCH, use_cache=False, **options))
    with model.disable_adapter():
        without = model.generate(input_ids=BATCH, **options)
    assert torch.equal(without, load(torch.float64).generate(BATCH, **options)) and not torch.equal(without, made)


def test_lora_is_saved_and_loaded(load: Load, tmp_path: Path) -> None:
    """An adapter folder on a fresh model says what was saved, as does a second adapter beside it."""
    model = adapted(load(), "all_linear")
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter")
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    again.add_adapter("second", peft.LoraConfig(r=2, target_modules=["out_proj"], task_type="CAUSAL_LM"))
    again.set_adapter("second")
    assert torch.allclose(logits(again), logits(load()), atol=1e-5)
    again.set_adapter("default")
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


def test_modules_to_save_are_saved_and_loaded(load: Load, tmp_path: Path) -> None:
    model = adapted(load(), "modules_to_save")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.01)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter")
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    assert not torch.allclose(logits(model), logits(adapted(load(), "all_linear")), atol=1e-5)


def test_an_untied_copy_merges(folder: Path, tmp_path: Path) -> None:
    """PEFT's remedy for tied models: load untied, copy the embedding into the head, then adapt both."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64, tie_word_embeddings=False)
    plain = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64)
    model.lm_head.weight.data = plain.lm_head.weight.data.clone()
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(plain))
    model.save_pretrained(tmp_path / "untied")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "untied", trust_remote_code=True)
    assert torch.equal(logits(model), logits(plain)) and not model.config.tie_word_embeddings
    made = adapted(model, "embedding_and_head")
    whole = logits(made)
    assert torch.allclose(logits(made.merge_and_unload()), whole, atol=1e-8)


def test_default_targets(folder: Path) -> None:
    """A configuration without targets adapts every projection of every mixer and nothing else."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".token_mixer." in n}
    made = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    found = {n.removeprefix("base_model.model.") for n, m in made.named_modules() if hasattr(m, "lora_A")}
    assert found == linears


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_lora_under_gradient_checkpointing(load: Load, reentrant: bool) -> None:
    """Gradients of all adapters are those without checkpointing."""
    plain = adapted(load(torch.float64), "all_linear").train()
    model = adapted(load(torch.float64), "all_linear").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for made in (plain, model):
        made(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        if a.requires_grad:
            assert a.grad is not None and torch.allclose(a.grad, b.grad, atol=1e-10), name


def test_prompt_tuning(load: Load) -> None:
    """Learned vectors in front of the prompt: trained, and in generation the same with the cache as without."""
    model = peft.get_peft_model(load(torch.float64), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    model.train()(input_ids=BATCH, attention_mask=MASK, labels=BATCH).loss.backward()
    (trained,) = (p for p in model.parameters() if p.requires_grad)
    assert trained.grad is not None and float(trained.grad.abs().sum()) > 0
    options = {"attention_mask": MASK, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    made, following = model.eval().generate(input_ids=BATCH, **options), BATCH
    for i in range(5):
        shown = torch.nn.functional.pad(MASK, (0, i), value=1)
        with torch.inference_mode():
            row = model(input_ids=following, attention_mask=shown, use_cache=False).logits[:, -1]
        following = torch.cat([following, row.argmax(-1, keepdim=True)], 1)
    assert torch.equal(made, following)
    assert torch.equal(model.generate(input_ids=BATCH, use_cache=False, **options), following)


def test_prefix_tuning_is_refused(load: Load) -> None:
    """Learned keys and values have no place in a recurrent state: said, and not left out in silence."""
    model = peft.get_peft_model(load(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="no recurrent state"):
        model(input_ids=TOKENS, labels=TOKENS)
    with pytest.raises(ValueError, match="no recurrent state"):
        model.eval().generate(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=3, pad_token_id=0)
