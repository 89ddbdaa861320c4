"""Tiny checkpoints with every parameter randomised, and a private place for the code that transformers copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.checkpoint.save import save_weights
from megatron.model.build import param_specs
from megatron.model.config import ModelConfig
from tests.export.modules_cache import use_private_modules_cache

TINY = ModelConfig(vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, mlp_width=48, layer_types=("metala", "metala"))


@pytest.fixture(autouse=True)
def modules_cache() -> None:
    """Keep the copies of exported code out of the user's cache."""
    use_private_modules_cache()


def random_weights(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Full weights under their logical names, none of them zero or one."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, spec in param_specs(config).items():
        value = torch.randn(spec.shape, generator=generator)
        made[name] = (value * (0.5 if len(spec.shape) > 1 else 0.3) + (1.0 if "norm" in name else 0.0)).to(dtype)
    return made


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint of `TINY` with some fields changed; returns its `global_step` folder."""

    def make(
        *, facts: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32, name: str = "run", **changes: Any
    ) -> Path:
        config = replace(TINY, **changes)
        extra: dict[str, Any] = {"facts": facts or {}, "state": {"consumed_tokens": 4096, "consumed_samples": 32}}
        return save_weights(
            tmp_path / name,
            random_weights(config, dtype=dtype),
            param_specs(config),
            model_config=config.to_dict(),
            iteration=7,
            **extra,
        )

    return make
