"""Bytes of state that a model carries from token to token, counted from its layers' `init_state`.

Recurrent sums are counted in fp32, windows and convolutions in bf16, as in generation with a bf16 model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from megatron.model.build import build_mixer
from megatron.model.config import ModelConfig

KINDS = {"conv": "convolution", "recurrent": "recurrent", "ssm": "recurrent", "tokens": "recurrent"}
"""Name of a state tensor -> what it is; all others are attention's keys, values and bookkeeping."""


def state_bytes(config: ModelConfig, tokens: int) -> dict[str, dict[str, int]]:
    """Mixer -> memory (recurrent, window, convolution) -> bytes per sequence, summed over the model's layers."""
    sizes: dict[str, dict[str, int]] = {}
    with torch.device("meta"):
        for i, kind in enumerate(config.layer_types):
            state = build_mixer(config, i).init_state(1, torch.bfloat16, "meta")
            for name, tensor in state.items():
                shape = [tokens if n == 0 else n for n in tensor.shape]  # an empty dimension grows with the text
                memory = KINDS.get(name, "window" if 0 not in tensor.shape else "all tokens")
                by_memory = sizes.setdefault(kind, {})
                by_memory[memory] = by_memory.get(memory, 0) + math.prod(shape) * tensor.element_size()
    return sizes


def total(parts: Mapping[str, Mapping[str, int]]) -> int:
    """Bytes of all layers."""
    return sum(sum(by_memory.values()) for by_memory in parts.values())
