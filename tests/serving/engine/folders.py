"""Exported folders that the engine tests serve: small models of every kind, and what the trainer itself answers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.save import save_weights
from megatron.export.hf import export_checkpoint
from megatron.generation.load import load_model
from megatron.generation.prompts import left_pad
from megatron.layers.base import Context
from megatron.model.build import param_specs
from megatron.model.config import ModelConfig
from tests.export.modules_cache import use_private_modules_cache

_BASE = ModelConfig(
    vocab_size=259, hidden_size=64, num_layers=3, num_heads=2, mlp_width=96, layer_types=("metala",) * 3, tie_embeddings=False
)
_LLAMA = {"positions": "rotary", "kv_heads": 1}
_CHANGES: dict[str, dict[str, Any]] = {
    "metala": {"tie_embeddings": True},
    "based": {
        "layer_types": ("base_conv", "based", "sliding", "base_conv"),
        "norm": "rmsnorm",
        "residual_fp32": True,
        "layer_options": {"based": {"feature_width": 8}, "sliding": {"window": 24}},
    },
    "jrt": {
        "layer_types": ("base_conv", "jrt", "sliding", "jrt"),
        "layer_options": {"jrt": {"feature_width": 8, "prefix_length": 40}, "sliding": {"window": 24}},
    },
    "mamba": {"layer_types": ("mamba",) * 3, "mlp": "none", "norm": "rmsnorm"},
    "alibi": {"layer_types": ("alibi",) * 3, "learned_positions": 512},
    "llama": {"layer_types": ("global",) * 3, "norm": "rmsnorm", "layer_options": {"global": _LLAMA}},
    "metala_global": {
        "layer_types": ("metala", "global", "metala", "metala"),
        "layer_options": {"metala": {"gate_round": "bf16"}, "global": _LLAMA | {"qk_norm": True, "bias": True}},
    },
    "five_kinds": {
        "layer_types": ("metala", "alibi", "mamba", "sliding", "based", "base_conv"),
        "layer_options": {"sliding": {"window": 24}, "based": {"feature_width": 8}},
        "embedding_norm": True,
    },
    "jrt_global": {
        "layer_types": ("jrt", "global", "metala"),
        "layer_options": {"jrt": {"feature_width": 8, "prefix_length": 40}, "global": _LLAMA},
        "parallel_residual": True,
    },
}
SHAPES = {name: replace(_BASE, num_layers=len(c.get("layer_types", "123")), **c) for name, c in _CHANGES.items()}
"""Name -> model; the last three keep both states and keys."""
LENGTHS = (1, 2, 3, 5, 8, 13, 17, 24, 31, 32, 33, 40, 41, 63, 64, 65, 90, 100, 127, 128, 150, 200, 257, 300)


@dataclass(frozen=True)
class Folder:
    """An exported folder and the checkpoint that it came from."""

    path: Path
    checkpoint: Path


def random_weights(shape: ModelConfig) -> dict[str, torch.Tensor]:
    """Values under which outputs depend on everything and are not the same token over and over."""
    generator, made = torch.Generator().manual_seed(0), {}
    for name, spec in param_specs(shape).items():
        value = torch.randn(spec.shape, generator=generator)
        wide = len(spec.shape) > 1 and "embed" not in name and "lm_head" not in name
        small = 0.1 if shape.tie_embeddings and "embed" in name else 0.5  # else a tied model repeats its input
        made[name] = value * (spec.shape[-1] ** -0.5 if wide else small) + (1.0 if "norm" in name else 0.0)
    return made


def make_folder(
    root: Path,
    name: str,
    shape: ModelConfig,
    *,
    facts: dict[str, Any] | None = None,
    tokenizer: dict[str, Path] | None = None,
    keep_padding: bool = False,
) -> Folder:
    """Save random weights and export them."""
    use_private_modules_cache()
    checkpoint = save_weights(
        root / name / "checkpoints",
        random_weights(shape),
        param_specs(shape),
        model_config=shape.to_dict(),
        iteration=1,
        facts=facts or {},
        tokenizer=tokenizer,
        state={"consumed_tokens": 1, "consumed_samples": 1},
    )
    export_checkpoint(checkpoint, root / name / "hf", keep_padding=keep_padding)
    return Folder(root / name / "hf", checkpoint)


def prompts(vocabulary: int, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    """Random prompts of these lengths."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]


@functools.cache
def _model(checkpoint: Path, dtype: torch.dtype) -> Any:
    return load_model(checkpoint, dtype=dtype)[0]


@torch.inference_mode()
def trainer_answers(
    folder: Folder, given: Sequence[Sequence[int]], count: int, vocabulary: int | None = None
) -> list[list[int]]:
    """Greedy tokens, of the first `vocabulary` ids, of the trainer's own model in fp32; a row of its batches says what its
    prompt says alone.
    """
    model = _model(folder.checkpoint, torch.float32)
    tokens, mask = left_pad(given, 0, "cpu")
    logits, state = model(tokens, Context(mask), model.init_state(len(tokens)))
    chosen = [logits[:, -1, :vocabulary].argmax(-1)]
    while len(chosen) < count:
        logits, state = model.step(chosen[-1], state)
        chosen.append(logits[:, :vocabulary].argmax(-1))
    return torch.stack(chosen, 1).tolist()


def trainer_logits(folder: Folder, text: Sequence[int], prompt: int, dtype: torch.dtype) -> torch.Tensor:
    """Logits [s, n] of the trainer's own model over a text whose first `prompt` tokens were read in one piece."""
    model = _model(folder.checkpoint, dtype)
    with torch.inference_mode():
        read, state = model(torch.tensor([list(text[:prompt])]), None, model.init_state(1))
        written, _ = model(torch.tensor([list(text[prompt:])]), None, state)
    return torch.cat([read[0], written[0]])
