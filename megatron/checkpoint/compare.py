"""Compares a checkpoint's model with this run's, field by field, before any tensor is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.checkpoint.manifest import Manifest
from megatron.errors import CheckpointError, ConfigError, DamagedCheckpoint
from megatron.model.build import param_specs
from megatron.model.config import ModelConfig
from megatron.model.resolved import resolved_or_as_it_is

_FREE_FIELDS = frozenset(  # may differ: they do not change what the weights mean
    {"hidden_dropout", "init_method", "output_init_method", "init_std", "mixer_init"}
)
_FREE_OPTION = ".dropout"  # of a mixer
RECIPE = "continue.yml"  # written by an import next to its checkpoint: `megatron/recipe.py`


def check_names(path: Path, manifest: Manifest, shapes: Mapping[str, tuple[int, ...]], same_model: bool = False) -> None:
    """Raise CheckpointError unless the checkpoint holds exactly this model's parameters.

    Args:
        path: the checkpoint, for messages.
        manifest: its manifest.
        shapes: name -> global shape of this model's parameters.
        same_model: the saved model config was compared and is equal. Then different parameters are damage, and an older
            checkpoint may have the right ones.
    """
    problem = _name_problem(manifest, shapes)
    if problem:
        raise (DamagedCheckpoint if same_model else CheckpointError)(
            "the checkpoint holds other parameters than this model",
            where=str(path),
            why=problem,
            hint="compare the model section of the config with the one in manifest.json",
        )


def _name_problem(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """How the weights differ from `shapes`; empty when they do not."""
    missing, extra = sorted(set(shapes) - set(manifest.weights)), sorted(set(manifest.weights) - set(shapes))
    if missing or extra:
        return f"{len(missing)} are missing{_few(missing)}, {len(extra)} are unknown{_few(extra)}"
    reshaped = [name for name, shape in shapes.items() if tuple(shape) != manifest.weights[name].shape]
    return f"{len(reshaped)} have another shape{_few(reshaped)}" if reshaped else ""


def model_problems(manifest: Manifest) -> list[str]:
    """Contradictions between a manifest's model config and its weights; none for a model that this release cannot build."""
    try:
        config = ModelConfig.from_dict(manifest.model_config)
        shapes = {name: spec.shape for name, spec in param_specs(config).items()}
    except (CheckpointError, ConfigError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
        return []
    problem = _name_problem(manifest, shapes)
    return [f"the weights are not those of its model: {problem}"] if problem else []


def _few(names: list[str]) -> str:
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""


def check_model(path: Path, manifest: Manifest, model_config: Mapping[str, Any]) -> list[str]:
    """Compare this run's model with the saved one, both with defaults filled in.

    Returns:
        The differences that are allowed (dropout, initialisation), for the log.

    Raises:
        CheckpointError: the models differ in another field; the message names the fields.
    """
    differing = model_differences(manifest.model_config, model_config)
    fatal = [text for name, text in differing.items() if name not in _FREE_FIELDS and not name.endswith(_FREE_OPTION)]
    if fatal:
        recipe = path.parent / RECIPE
        hint = (
            f"take the model section of {recipe}"
            if recipe.is_file()
            else "take the model section of the config that the checkpoint was trained with (in its folder configs/)"
        )
        if len(fatal) == 1 and "vocab_size" in differing:  # the same tokenizer, padded for another tensor-parallel size
            size = manifest.model_config["vocab_size"]
            hint = f"padded_vocab_size: {size}, if only model_parallel_size has changed; else {hint}"
        raise CheckpointError(
            "the checkpoint is of another model",
            where=str(path),
            why="; ".join(fatal[:6]) + (f"; and {len(fatal) - 6} more" if len(fatal) > 6 else ""),
            hint=hint,
        )
    return list(differing.values())


def model_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, str]:
    """Dotted field -> text, for every field in which two models differ once defaults are filled in."""
    a, b = (json.loads(json.dumps(resolved_or_as_it_is(values))) for values in (saved, current))
    return differences(a, b)


def differences(saved: Any, current: Any, name: str = "") -> dict[str, str]:
    """Dotted field -> the saved and the current value, for every leaf that differs."""
    if isinstance(saved, dict) and isinstance(current, dict):
        texts: dict[str, str] = {}
        for key in [*saved, *(k for k in current if k not in saved)]:
            texts |= differences(saved.get(key), current.get(key), f"{name}.{key}" if name else str(key))
        return texts
    return {} if saved == current else {name: f"{name} is {_short(saved)} in the checkpoint, {_short(current)} here"}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
