"""Tiny models of every family whose exported folders are carried from one transformers to another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.save import save_weights
from megatron.model.build import param_specs
from megatron.model.config import ModelConfig

VOCABULARY, END, PADDING = 512, 0, 1
"""Of `CharLevelTokenizer`: bytes as tokens, `END` closes a text, `PADDING` fills a batch."""

_BASE = ModelConfig(
    vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=2, mlp_width=48, layer_types=("metala", "metala")
)
_BASED = ("base_conv", "based", "sliding", "base_conv")
_CHANGES: dict[str, dict[str, Any]] = {
    "metala": {},
    "based": {
        "layer_types": _BASED,
        "num_layers": 4,
        "norm": "rmsnorm",
        "residual_fp32": True,
        "layer_options": {"based": {"feature_width": 4}, "sliding": {"window": 5}},
    },
    "jrt": {"layer_types": ("jrt", "jrt"), "layer_options": {"jrt": {"feature_width": 4, "prefix_length": 8}}},
    "mamba": {"layer_types": ("mamba", "mamba"), "mlp": "none", "norm": "rmsnorm"},
    "alibi": {"layer_types": ("alibi", "alibi")},
    "hybrid": {
        "layer_types": ("metala", "alibi", "mamba", "sliding"),
        "num_layers": 4,
        "layer_options": {"sliding": {"window": 5}},
    },
}
FAMILIES = {name: replace(_BASE, **changes) for name, changes in _CHANGES.items()}

PROMPTS = ("one longer prompt of 33 characters", "b", "a prompt", "xy")
"""Of different lengths, so that a batch of them is padded on the left."""
NEW_TOKENS = 24
"""Most new tokens per prompt; beams and greedy alike."""


def weights(config: ModelConfig) -> dict[str, Tensor]:
    """Random values for every parameter, large enough that greedy texts do not repeat one token.

    Args:
        config: the model.

    Returns:
        Logical name -> tensor, float32, the same on every run.
    """
    generator, weights_by_name = torch.Generator().manual_seed(1), {}
    for name, spec in param_specs(config).items():
        value = torch.randn(spec.shape, generator=generator)
        weights_by_name[name] = value * (0.35 if len(spec.shape) > 1 else 0.2) + (1.0 if "norm" in name else 0.0)
    return weights_by_name


def write_checkpoint(name: str, folder: Path) -> Path:
    """A checkpoint of family `name` with a byte tokenizer; returns its `global_step` folder."""
    config = FAMILIES[name]
    facts = {"tokenizer": {"type": "CharLevelTokenizer", "vocab_size": VOCABULARY, "eod": END, "pad": PADDING}}
    state = {"consumed_tokens": 4096, "consumed_samples": 32}
    specs = param_specs(config)
    return save_weights(folder, weights(config), specs, model_config=config.to_dict(), iteration=7, facts=facts, state=state)
