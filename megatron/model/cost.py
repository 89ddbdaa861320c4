"""Number of parameters and FLOPs of a config, without weights; each layer counts its own FLOPs."""

from __future__ import annotations

import math

import torch

from megatron.model.build import build_mixer, param_specs
from megatron.model.config import ModelConfig


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """(all, without embedding and output projection)."""
    sizes = {name: math.prod(spec.shape) for name, spec in param_specs(config).items()}
    total = sum(sizes.values())
    outer = sizes["model.embed_tokens.weight"] + sizes.get("lm_head.weight", 0)
    return total, total - outer


def forward_flops(config: ModelConfig, seq_length: int) -> float:
    """Forward FLOPs per token at this sequence length; a multiply-add counts 2. Linear layers do not grow with it.

    Norms, activations and embedding lookups are not counted, as is usual.
    """
    with torch.device("meta"):
        mixers = [build_mixer(config, i) for i in range(config.num_layers)]
    mlp = 2.0 * config.hidden_size * config.mlp_width * {"gated": 3, "plain": 2, "none": 0}[config.mlp]
    head = 2.0 * config.hidden_size * config.vocab_size
    return sum(m.flops(seq_length) for m in mixers) + config.num_layers * mlp + head


def train_flops(config: ModelConfig, seq_length: int) -> float:
    """FLOPs per token of one training step without recomputation: forward plus twice that for the backward."""
    return 3.0 * forward_flops(config, seq_length)
