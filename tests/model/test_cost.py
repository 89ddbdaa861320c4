"""FLOPs of every mixer and of whole models, forward and backward, against PyTorch's counter on the plain forms, within 5 %.

The counter sees matrix products only. So like is compared with like:

- A depthwise convolution of w taps is written as sums of shifted products and costs 2 w per channel, which the counter does not
  see; nor does it see 7 of the 9 operations per channel and state of Mamba's scan (the other 2 are its read-out, a product).
- The plain form of softmax attention makes the product of every query with every key and masks half of them. Only pairs in
  sight are work; they are counted here one by one.
- Norms, activations, gates and rotations are left out on both sides. The chunked form of MetaLA sums log decays by a product
  with a triangle of ones, 2 c per channel of the keys, which a GPU kernel does without: it is no work of the operator. Lengths
  here are whole chunks, since it fills up the last one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron import registry
from megatron.layers.base import Context, Layer
from megatron.model.build import build_mixer, build_model
from megatron.model.config import ModelConfig
from megatron.model.cost import count_parameters, forward_flops, train_flops
from megatron.model.loss import token_loss

SOFTMAX = ("global", "alibi", "sliding")
CHUNK = 64
# Forward passes agree to 0.2 % but for those whose last chunk may be half filled.
NEAR = {"based": 0.05, "jrt": 0.05}
# mixer -> its options; each with and without what changes its cost.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "metala": [{}, {"conv_width": 7}],
    "based": [{}, {"decay": True}, {"feature_width": 8}],
    "jrt": [{"prefix_length": 16}, {"prefix_length": 48}],
    "mamba": [{}, {"state_size": 8, "expand": 3, "dt_rank": 16, "conv_width": 3}],
    "sliding": [{"window": 9}, {"window": 500}],
    "global": [{}, {"kv_heads": 2}, {"window": 9}],
    "alibi": [{}, {"kv_heads": 1}],
    "base_conv": [{}, {"conv_width": 5, "expand": 3}],
}
# A mixer that is not listed is counted as it is by default, and may have elementwise work that the counter does not see.
OTHERS = [mixer for mixer in registry.layer_options() if mixer not in OPTIONS]
CASES = [(mixer, options) for mixer, found in OPTIONS.items() for options in found]
CASES += [(mixer, {}) for mixer in OTHERS]
SHAPES = [(64, 4, 64), (128, 4, 192), (96, 2, 32)]


def _config(mixer: str, options: dict[str, Any], d: int, heads: int) -> ModelConfig:
    return ModelConfig(96, d, 1, heads, 2 * d, (mixer,), {mixer: options} if options else {})


def _context(mixer: str) -> Context:
    """The plain form: step by step or in chunks of products, whichever is products."""
    return Context(backend="reference" if mixer in SOFTMAX else "torch")


def _unseen(layer: Layer, mixer: str) -> float:
    """Work per token that is no matrix product."""
    if mixer == "metala":
        return 2.0 * layer.width * layer.config.hidden_size  # type: ignore[operator]
    if mixer == "base_conv":
        return 2.0 * layer.width * layer.expand * layer.config.hidden_size  # type: ignore[operator]
    if mixer == "mamba":
        inner, states = layer.A_log.shape  # type: ignore[misc, union-attr]
        return 2.0 * layer.width * inner + 7.0 * inner * states  # type: ignore[operator]
    return 0.0


def _spare(layer: Layer, mixer: str, d: int, s: int) -> float:
    """Products per token that the plain form makes and that are no work."""
    if mixer == "metala":
        return 2.0 * min(CHUNK, s) * layer.key_dim * layer.config.num_heads  # type: ignore[operator]
    if mixer not in SOFTMAX:
        return 0.0
    window = getattr(layer.config, "window", None)
    pairs = sum(1 for t in range(s) for j in range(s) if j <= t and (window is None or t - j <= window))
    return 4.0 * d * (s - pairs / s)


def _counted(config: ModelConfig, mixer: str, s: int) -> tuple[float, float]:
    """(forward, backward) products of one layer on one sequence, per token."""
    torch.manual_seed(0)
    layer = build_mixer(config, 0)
    for p in layer.parameters():
        torch.nn.init.normal_(p, 0.0, 0.02)
    x = torch.randn(1, s, config.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y, _ = layer(x, _context(mixer))
        forward = counter.get_total_flops()
        y.sum().backward()
    return forward / s, (counter.get_total_flops() - forward) / s


@pytest.mark.parametrize(("d", "heads", "s"), SHAPES)
@pytest.mark.parametrize(("mixer", "options"), CASES, ids=[f"{m}-{n}" for n, (m, _) in enumerate(CASES)])
def test_a_mixer_against_the_counter(mixer: str, options: dict[str, Any], d: int, heads: int, s: int) -> None:
    config = _config(mixer, options, d, heads)
    with torch.device("meta"):
        layer = build_mixer(config, 0)
    forward, backward = _counted(config, mixer, s)
    unseen, spare = _unseen(layer, mixer), _spare(layer, mixer, d, s)
    own = layer.flops(s)
    near = 0.2 if mixer in OTHERS else NEAR.get(mixer, 0.002)
    assert own == pytest.approx(forward - spare + unseen, rel=near)
    assert 2 * own == pytest.approx(backward - 2 * spare + 2 * unseen, rel=max(near, 0.05))


MODELS = {
    "metala": ModelConfig(512, 64, 2, 2, 176, ("metala",) * 2),
    "gpt": ModelConfig(512, 64, 2, 4, 256, ("global",) * 2, norm="layernorm", mlp="plain", activation="gelu", mlp_bias=True),
    "untied": ModelConfig(512, 64, 2, 4, 256, ("alibi",) * 2, mlp="plain", tie_embeddings=False, learned_positions=80),
    "parallel": ModelConfig(512, 64, 2, 4, 128, ("global",) * 2, parallel_residual=True, shared_norm=True),
    "mamba": ModelConfig(512, 64, 2, 1, 0, ("mamba",) * 2, mlp="none"),
    "hybrid": ModelConfig(512, 64, 4, 2, 128, ("based", "sliding", "base_conv", "metala"), {"sliding": {"window": 9}}),
    "jrt": ModelConfig(512, 64, 2, 4, 128, ("jrt", "global"), {"jrt": {"prefix_length": 16}}),
}


@pytest.mark.parametrize("name", MODELS)
def test_whole_models_against_the_counter(name: str) -> None:
    """Blocks with their MLPs, the output projection and the loss, forward and backward."""
    config, s, b = MODELS[name], 64, 2
    torch.manual_seed(0)
    model = build_model(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.0, 0.02)
    text = torch.randint(0, config.vocab_size, (b, s + 1))
    spare = unseen = 0.0
    for block, mixer in zip(model.model.blocks(), config.layer_types, strict=True):
        spare += _spare(block.token_mixer, mixer, config.hidden_size, s)
        unseen += _unseen(block.token_mixer, mixer)
        kind = _context(mixer)
        block.register_forward_pre_hook(lambda _, args, kind=kind: (args[0], replace(args[1], backend=kind.backend), *args[2:]))
    with FlopCounterMode(display=False) as counter:
        logits, _ = model(text[:, :-1])
        forward = counter.get_total_flops() / (b * s)
        token_loss(logits, text[:, 1:]).backward()
    both = counter.get_total_flops() / (b * s)
    assert forward_flops(config, s) == pytest.approx(forward - spare + unseen, rel=0.05)
    assert train_flops(config, s) == pytest.approx(both - 3 * (spare - unseen), rel=0.05)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_within_are_all_but_embedding_and_output_matrix(name: str) -> None:
    config = MODELS[name]
    total, inner = count_parameters(config)
    assert total == sum(p.numel() for p in build_model(config).parameters())
    assert total - inner == config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
