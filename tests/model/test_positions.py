"""Learned positions, embedding norm, parallel blocks: one pass = prefill and steps, padding, documents, stages, formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron.errors import ConfigError
from megatron.layers.base import Context
from megatron.model.build import build_model, param_specs
from megatron.model.config import ModelConfig
from megatron.model.init import init_weights
from megatron.model.lm import LanguageModel
from megatron.model.stages import stages_of
from megatron.parallel.shard_spec import slice_of

BASE = ModelConfig(64, 32, 2, 4, 48, ("global", "metala"), mlp="plain", norm="layernorm", norm_eps=1e-5, activation="gelu_tanh")
KINDS = {
    "learned": replace(BASE, learned_positions=40),
    "bloom-like": replace(BASE, embedding_norm=True, layer_options={"global": {"positions": "alibi", "bias": True}}),
    "parallel": replace(BASE, parallel_residual=True, learned_positions=40, norm="layernorm_no_bias"),
    "shared norm": replace(BASE, parallel_residual=True, shared_norm=True),
}


def make(config: ModelConfig) -> LanguageModel:
    specs = param_specs(config)
    with torch.device("meta"):
        model = build_model(config)
    init_weights(
        model, {n: n for n in specs}, specs, config, 1,
        slices=lambda spec: slice_of(spec.shape, spec.cut, 0, 1), device="cpu", dtype=torch.float64,
    )  # fmt: skip
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.mul_(8.0 if "positions" in name else 4.0)  # so that nothing passes by being small
    return model


def tokens(b: int = 2, s: int = 30) -> Tensor:
    return torch.randint(0, 64, (b, s), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return make(KINDS[request.param])


def test_pieces_and_steps_equal_one_pass(model: LanguageModel) -> None:
    ids = tokens()
    whole, none = model(ids)
    assert none is None
    first, state = model(ids[:, :11], None, model.init_state(2))
    second, state = model(ids[:, 11:20], None, state)
    parts = [first, second]
    for t in range(20, 30):
        logits, state = model.step(ids[:, t], state)
        parts.append(logits[:, None])
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-11


def test_left_padding(model: LanguageModel) -> None:
    ids = tokens()
    mask = torch.ones(2, 30)
    mask[1, :9] = 0
    padded, state = model(ids, Context(mask=mask), model.init_state(2))
    alone, other = model(ids[1:, 9:], None, model.init_state(1))
    assert (padded[1:, 9:] - alone).abs().max() < 1e-11
    assert (model.step(ids[:, 3], state)[0][1:] - model.step(ids[1:, 3], other)[0]).abs().max() < 1e-11


def test_documents(model: LanguageModel) -> None:
    ids = tokens(1)
    segments = torch.tensor([[0] * 7 + [1] * 15 + [2] * 8])
    apart, _ = model(ids, Context(segment_ids=segments))
    for a, b in ((0, 7), (7, 22), (22, 30)):
        assert (apart[:, a:b] - model(ids[:, a:b])[0]).abs().max() < 1e-11
    first, state = model(ids[:, :12], Context(segment_ids=segments[:, :12]), model.init_state(1))
    second, _ = model(ids[:, 12:], Context(segment_ids=segments[:, 12:]), state)
    assert (torch.cat([first, second], 1) - apart).abs().max() < 1e-11


def test_stages_are_the_model(model: LanguageModel) -> None:
    ids, segments = tokens(), torch.arange(30).ge(13).long().expand(2, -1)
    activations: object = (ids, segments)
    for stage in stages_of(model):
        activations = stage.module(activations)
    assert torch.equal(activations, model(ids, Context(segment_ids=segments))[0])  # type: ignore[arg-type]


def test_every_parameter_gets_a_gradient(model: LanguageModel) -> None:
    model(tokens())[0].pow(2).sum().backward()
    for name, p in model.named_parameters():
        # attention is blind to a number that is the same for all keys of a query, which a key bias is
        assert (p.grad is not None and p.grad.abs().max() > 0) or name.endswith("k_proj.bias"), name


@pytest.mark.parametrize("shared", [False, True])
def test_parallel_block_by_hand(shared: bool) -> None:
    block = make(replace(BASE, parallel_residual=True, shared_norm=shared)).model.blocks()[0]
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    second = block.token_norm if block.channel_norm is None else block.channel_norm
    assert shared == (block.channel_norm is None)
    want = x + block.token_mixer(block.token_norm(x), Context())[0] + block.channel_mixer(second(x))
    assert (block(x, Context())[0] - want).abs().max() < 1e-13


def test_refusals() -> None:
    with pytest.raises(ValueError, match="learned 40 positions"):
        make(KINDS["learned"])(tokens(1, 41))
    with pytest.raises(ValueError, match="shared_norm needs"):
        replace(BASE, shared_norm=True)
    with pytest.raises(ConfigError, match="kv_heads 3"):
        build_model(replace(BASE, layer_options={"global": {"kv_heads": 3}}))
