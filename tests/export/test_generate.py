"""`generate` of every family: the cache changes nothing, in greedy search, sampling and beams; what cannot work says why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.export.families import BATCH, MASK, TOKENS

Load = Callable[..., Any]


def generated(model: Any, tokens: Tensor = BATCH, mask: Tensor | None = MASK, **options: Any) -> Tensor:
    """New tokens; of the left-padded batch by default, greedy, without an end."""
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    made = model.generate(tokens, attention_mask=mask, **options)
    return made[:, tokens.shape[1] :]


def test_greedy(load: Load) -> None:
    """The same with the cache and without; and each row of the left-padded batch as it is alone."""
    model = load(torch.float64)
    made = generated(model)
    assert torch.equal(made, generated(model, use_cache=False))
    for row, mask, new in zip(BATCH, MASK, made, strict=True):
        assert torch.equal(generated(model, row[mask == 1][None], None)[0], new)


def test_sampling(load: Load) -> None:
    """One seed gives one text, with the cache and without."""
    model = load(torch.float64)

    def draw(seed: int, **options: Any) -> Tensor:
        torch.manual_seed(seed)
        return generated(model, do_sample=True, temperature=1.5, top_k=0, num_return_sequences=2, **options)

    assert draw(0).shape == (4, 8)
    assert torch.equal(draw(0), draw(0, use_cache=False))
    assert not torch.equal(draw(0), draw(1))


@pytest.mark.parametrize("sample", [False, True], ids=["beams", "beam_sampling"])
def test_beams(load: Load, sample: bool) -> None:
    """Several beams per row, of which several come back."""
    model = load(torch.float64)

    def search(**options: Any) -> Tensor:
        torch.manual_seed(0)
        return generated(model, num_beams=4, num_return_sequences=3, do_sample=sample, **options)

    made = search()
    assert made.shape == (6, 8) and len({tuple(row) for row in made.tolist()}) > 2
    assert torch.equal(made, search(use_cache=False))


@pytest.mark.parametrize("size", [1, 5, 100])
def test_prefill_chunk_size(load: Load, size: int) -> None:
    """A prompt that is read in pieces."""
    model = load(torch.float64)
    assert torch.equal(generated(model, prefill_chunk_size=size), generated(model))


def test_embedded_prompt(load: Load) -> None:
    """`inputs_embeds` in place of tokens."""
    model = load(torch.float64)
    embedded = model.get_input_embeddings()(BATCH)
    made = model.generate(
        inputs_embeds=embedded, attention_mask=MASK, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert torch.equal(made, generated(model))


def test_copied_cache(load: Load) -> None:
    """A prompt that is read once and continued twice."""
    model, longer = load(torch.float64), torch.cat([TOKENS, TOKENS[:, :3]], 1)
    with torch.inference_mode():
        read = model(TOKENS, use_cache=True).past_key_values
    want = generated(model, longer, None)
    for _ in range(2):
        assert torch.equal(generated(model, longer, None, past_key_values=copy.deepcopy(read)), want)


def test_prompt_lookup_is_refused(load: Load) -> None:
    with pytest.raises(ValueError, match="not supported with stateful models"):
        generated(load(), TOKENS[:1], None, prompt_lookup_num_tokens=3)


def test_an_assistant_is_refused(load: Load) -> None:
    with pytest.raises(ValueError, match="not supported with stateful models"):
        generated(load(), TOKENS[:1], None, assistant_model=load())


def test_as_assistant_is_refused(load: Load) -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    main = LlamaForCausalLM(LlamaConfig(vocab_size=64, intermediate_size=16, **sizes)).eval()
    with pytest.raises(ValueError, match="recurrent state cannot be rolled back"):
        generated(main, TOKENS[:1], None, assistant_model=load())


@pytest.mark.parametrize("kind", ["dynamic", "static", "offloaded", "quantized"])
def test_other_caches(load: Load, kind: str) -> None:
    """A cache of transformers asked for by its name is never taken and left empty; the model's own serves instead."""
    model = load(torch.float64)
    assert torch.equal(generated(model, cache_implementation=kind), generated(model))
