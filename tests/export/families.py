"""The families of exported models that each feature is tried on, as tiny as they can be, and tokens to try them with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron.model.build import param_specs
from megatron.model.config import ModelConfig

_SMALL = ModelConfig(vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, mlp_width=48, layer_types=("metala", "metala"))
_WINDOW = {"sliding": {"window": 5}}
_CHANGES: dict[str, dict[str, Any]] = {
    "metala": {},
    "metala_untied": {"tie_embeddings": False},
    "based": {
        "layer_types": ("base_conv", "based", "sliding", "base_conv"),
        "num_layers": 4,
        "norm": "rmsnorm",
        "residual_fp32": True,
        "layer_options": {"based": {"feature_width": 4}, **_WINDOW},
    },
    "jrt": {"layer_types": ("jrt", "jrt"), "layer_options": {"jrt": {"feature_width": 4, "prefix_length": 8}}},
    "mamba": {"layer_types": ("mamba", "mamba"), "mlp": "none", "norm": "rmsnorm"},
    "alibi": {"layer_types": ("alibi", "alibi")},
    "hybrid": {"layer_types": ("metala", "alibi", "mamba", "sliding"), "num_layers": 4, "layer_options": _WINDOW},
}
FAMILIES = {name: replace(_SMALL, **changes) for name, changes in _CHANGES.items()}
"""Name -> model. `jrt` reads the first eight tokens in both directions: its prompts are at least as long in these tests."""
QUICK = ("hybrid",)
"""What `make test-fast` tries every feature on: the general classes with four kinds of state, MetaLA's among them."""


def _wide(config: ModelConfig) -> ModelConfig:
    options = {
        kind: {**o, **({"feature_width": 16} if "feature_width" in o else {})} for kind, o in config.layer_options.items()
    }
    return replace(config, hidden_size=64, mlp_width=64, layer_options=options)


WIDE = {f"{name}_wide": _wide(config) for name, config in FAMILIES.items()}
"""The same with projections that are multiples of 32 by 64, but for Mamba's narrow ones: the blocks of bitsandbytes."""

TOKENS = torch.randint(2, 64, (2, 12), generator=torch.Generator().manual_seed(1))
"""Two rows without padding."""
PADDED = torch.cat([torch.full((1, 3), 9), TOKENS[1:, :9]], 1)
"""One row of nine tokens behind three of padding; `MASK` says so."""
BATCH = torch.cat([TOKENS[:1], PADDED])
MASK = torch.tensor([[1] * 12, [0] * 3 + [1] * 9])
"""Of `BATCH`, two rows of twelve and of nine tokens, padded on the left."""


def family_weights(config: ModelConfig) -> dict[str, Tensor]:
    """Random values for every parameter of a model under its logical name, none of them zero or one."""
    generator, made = torch.Generator().manual_seed(0), {}
    for name, spec in param_specs(config).items():
        value = torch.randn(spec.shape, generator=generator)
        made[name] = value * (8 / config.hidden_size if len(spec.shape) > 1 else 0.2) + (1.0 if "norm" in name else 0.0)
    return made


def rows(count: int = 24, length: int = 16) -> list[dict[str, list[int]]]:
    """Rows of a dataset for Trainer; the first tokens of most of them carry no loss."""
    tokens = torch.randint(2, 64, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": [-100] * (i % (length - 2)) + row[i % (length - 2) :]} for i, row in enumerate(tokens)]
