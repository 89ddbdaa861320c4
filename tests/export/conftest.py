"""Tiny checkpoints with every parameter randomised, exported folders of every family, and a private place for copied code."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron.checkpoint.save import save_weights
from megatron.export.hf import export_checkpoint
from megatron.model.build import param_specs
from megatron.model.config import ModelConfig
from tests.export.families import FAMILIES, QUICK, WIDE, family_weights
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
        *,
        facts: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        name: str = "run",
        tokenizer: dict[str, Path] | None = None,
        **changes: Any,
    ) -> Path:
        config = replace(TINY, **changes)
        extra: dict[str, Any] = {"facts": facts or {}, "state": {"consumed_tokens": 4096, "consumed_samples": 32}}
        return save_weights(
            tmp_path / name,
            random_weights(config, dtype=dtype),
            param_specs(config),
            model_config=config.to_dict(),
            iteration=7,
            tokenizer=tokenizer,
            **extra,
        )

    return make


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family, or <family>_wide -> its exported folder, made once per process; nothing may be written into it."""
    use_private_modules_cache()
    root = tmp_path_factory.mktemp("families")

    @functools.cache
    def folder(family: str) -> Path:
        config = (FAMILIES | WIDE)[family]
        extra: dict[str, Any] = {"facts": {}, "state": {"consumed_tokens": 1, "consumed_samples": 1}}
        checkpoint = save_weights(
            root / "checkpoints" / family,
            family_weights(config),
            param_specs(config),
            model_config=config.to_dict(),
            iteration=7,
            **extra,
        )
        return export_checkpoint(checkpoint, root / family).folder

    return folder


@pytest.fixture(scope="session")
def load_family(exported: Callable[[str], Path]) -> Callable[..., Any]:
    """(family, dtype = fp32) -> the model of its folder in evaluation mode, a new one with each call."""

    @functools.cache
    def original(family: str, dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(exported(family), trust_remote_code=True, dtype=dtype).eval()

    def load(family: str, dtype: torch.dtype = torch.float32) -> Any:
        return copy.deepcopy(original(family, dtype))

    return load


@pytest.fixture(params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES])
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn, so that a test's name reads as feature and family."""
    return request.param


@pytest.fixture
def folder(family: str, exported: Callable[[str], Path]) -> Path:
    """The family's folder; nothing may be written into it."""
    return exported(family)


@pytest.fixture
def load(family: str, load_family: Callable[..., Any]) -> Callable[..., Any]:
    """(dtype = fp32) -> a new model of the family in evaluation mode."""
    return functools.partial(load_family, family)
