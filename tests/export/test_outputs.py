"""Optional outputs of every family: hidden states, attention weights, tuples, by argument and by configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.ops.attention import alibi_slopes
from tests.export.families import BATCH, FAMILIES, MASK, TOKENS

Load = Callable[..., Any]
SOFTMAX = ("alibi", "sliding")


@torch.inference_mode()
def test_hidden_states(load: Load, family: str) -> None:
    """Asked for by argument or configuration: what each block reads, and what the head reads last."""
    model = load(torch.float64)
    assert model(TOKENS).hidden_states is None
    by_argument = model(TOKENS, output_hidden_states=True)
    model.config.output_hidden_states = True
    out = model(TOKENS)
    assert len(out.hidden_states) == FAMILIES[family].num_layers + 1
    assert all(torch.equal(a, b) for a, b in zip(out.hidden_states, by_argument.hidden_states, strict=True))
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(TOKENS))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert model(TOKENS, output_hidden_states=False).hidden_states is None


def softmax_weights(mixer: Any, x: Tensor, kind: str) -> Tensor:
    """[h, s, s]: the weights of an attention layer on normed x [s, d], from its definition."""
    width, s = mixer.head_dim, len(x)
    q, k = (p(x).unflatten(-1, (-1, width)).transpose(0, 1) for p in (mixer.q_proj, mixer.k_proj))
    back = torch.arange(s)[:, None] - torch.arange(s)
    hidden = back < 0
    if kind == "sliding":
        half = width // 2
        angle = torch.arange(s)[:, None] / 10000.0 ** (torch.arange(half, dtype=torch.float64) / half)

        def turned(t: Tensor) -> Tensor:
            a, b = t[..., :half], t[..., half:]
            return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

        q, k, hidden = turned(q), turned(k), hidden | (back > mixer.options.window)
    scores = q @ k.transpose(-1, -2) / math.sqrt(width)
    if kind == "alibi":
        scores = scores - torch.tensor(alibi_slopes(mixer.options.num_heads, 8.0), dtype=x.dtype)[:, None, None] * back
    return scores.masked_fill(hidden, -math.inf).softmax(-1)


@torch.inference_mode()
def test_attentions(load: Load, family: str) -> None:
    """Weights of softmax layers; None for layers that have none."""
    model = load(torch.float64)
    assert model(TOKENS).attentions is None
    out = model(TOKENS[:1], output_attentions=True, output_hidden_states=True)
    assert torch.equal(out.logits, model(TOKENS[:1]).logits)
    assert len(out.attentions) == FAMILIES[family].num_layers
    for i, kind in enumerate(FAMILIES[family].layer_types):
        if kind not in SOFTMAX:
            assert out.attentions[i] is None
            continue
        block = model.model.layers[i]
        want = softmax_weights(block.token_mixer, block.token_norm(out.hidden_states[i][0]), kind)
        assert torch.allclose(out.attentions[i][0], want, atol=1e-6), i


@torch.inference_mode()
def test_attentions_through_the_cache(load: Load, family: str) -> None:
    """A step's weights are the last row of the whole pass's."""
    model = load(torch.float64)
    whole = model(BATCH, attention_mask=MASK, output_attentions=True)
    read = model(BATCH[:, :-1], attention_mask=MASK[:, :-1], use_cache=True)
    step = model(BATCH[:, -1:], attention_mask=MASK, past_key_values=read.past_key_values, output_attentions=True)
    for i, kind in enumerate(FAMILIES[family].layer_types):
        if kind == "alibi":
            assert torch.allclose(step.attentions[i][:, :, 0], whole.attentions[i][:, :, -1], atol=1e-8)
        elif kind == "sliding":  # the state holds the keys in sight only
            assert torch.allclose(step.attentions[i].sum(-1), torch.ones((), dtype=torch.float64), atol=1e-6)
        else:
            assert step.attentions[i] is None


@torch.inference_mode()
def test_attentions_of_padded_rows(load: Load, family: str) -> None:
    """Weights of a masked row, with padding at the start and a hole, are those of its tokens alone, at their own places."""
    model, hidden = load(torch.float64), torch.tensor([0, 1, 6])
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, hidden] = 0
    real = mask[0] == 1
    got = model(TOKENS[:1], attention_mask=mask, output_attentions=True).attentions
    want = model(TOKENS[:1, real], output_attentions=True).attentions
    for a, b, kind in zip(got, want, FAMILIES[family].layer_types, strict=True):
        assert (a is None) is (b is None) is (kind not in SOFTMAX)
        if a is not None:
            assert torch.allclose(a[:, :, real][..., real], b, atol=1e-9)


@torch.inference_mode()
def test_tuples(load: Load) -> None:
    """`return_dict=False` by argument and by configuration: the same values in the same order, None left out."""
    model = load()
    out = model(TOKENS, labels=TOKENS, output_hidden_states=True, use_cache=False)
    plain = model(TOKENS, labels=TOKENS, output_hidden_states=True, use_cache=False, return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == 3
    assert torch.equal(plain[0], out.loss) and torch.equal(plain[1], out.logits) and len(plain[2]) == len(out.hidden_states)
    model.config.return_dict = False
    assert isinstance(model(TOKENS), tuple)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@torch.inference_mode()
def test_both_names_of_the_cache(load: Load, name: str) -> None:
    """The cache is read and given under either name with every version."""
    model = load(torch.float64)
    read = model(TOKENS[:, :9], use_cache=True)
    assert getattr(read, name) is read.past_key_values
    step = model(TOKENS[:, 9:], **{name: getattr(read, name)})
    assert torch.allclose(step.logits, model(TOKENS).logits[:, 9:], atol=1e-9)
