"""Whether a checkpoint is of this run's model, field by field, before anything is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.checkpoint.damage import DamagedCheckpoint
from megatron.checkpoint.manifest import Manifest
from megatron.errors import CheckpointError, ConfigError
from megatron.model.build import param_specs
from megatron.model.config import ModelConfig
from megatron.model.resolved import resolved_or_as_it_is

_FREE_FIELDS = frozenset(  # not the maths of the weights
    {"hidden_dropout", "init_method", "output_init_method", "init_std", "mixer_init"}
)
_FREE_OPTION = ".dropout"  # of a mixer
RECIPE = "continue.yml"  # what an import writes beside its checkpoint: `megatron/recipe.py`


def check_names(path: Path, manifest: Manifest, shapes: Mapping[str, tuple[int, ...]], same_model: bool = False) -> None:
    """Raise CheckpointError unless the checkpoint holds exactly this model's parameters.

    Args:
        shapes: name -> global shape of this model's. same_model: the saved model was compared and is this one: then parameters
            that differ are damage, and an older checkpoint may have the right ones.
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
    """Empty when the weights are those of `shapes`."""
    missing, extra = sorted(set(shapes) - set(manifest.weights)), sorted(set(manifest.weights) - set(shapes))
    if missing or extra:
        return f"{len(missing)} are missing{_few(missing)}, {len(extra)} are unknown{_few(extra)}"
    odd = [name for name, shape in shapes.items() if tuple(shape) != manifest.weights[name].shape]
    return f"{len(odd)} have another shape{_few(odd)}" if odd else ""


def model_problems(manifest: Manifest) -> list[str]:
    """What is wrong between a manifest's model and its weights; nothing is said of a model that this release does not build."""
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
    """Compare this run's model with the saved one, both resolved: how they were written does not matter.

    Returns:
        The differences that are allowed (dropout, initialisation), for the log.

    Raises:
        CheckpointError: the models differ in anything else; the message names the fields.
    """
    differing = model_differences(manifest.model_config, model_config)
    hard = [text for name, text in differing.items() if name not in _FREE_FIELDS and not name.endswith(_FREE_OPTION)]
    if hard:
        recipe = path.parent / RECIPE
        raise CheckpointError(
            "the checkpoint is of another model",
            where=str(path),
            why="; ".join(hard[:6]) + (f"; and {len(hard) - 6} more" if len(hard) > 6 else ""),
            hint=f"take the model section of {recipe}"
            if recipe.is_file()
            else "take the model section of the config that the checkpoint was trained with (it lies in configs/)",
        )
    return list(differing.values())


def model_differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, str]:
    """Dotted field -> text, for every field in which two models differ once everything is said."""
    a, b = (json.loads(json.dumps(resolved_or_as_it_is(values))) for values in (saved, own))
    return differences(a, b)


def differences(saved: Any, own: Any, name: str = "") -> dict[str, str]:
    """Dotted field -> what is saved and what this run has, for every leaf that differs."""
    if isinstance(saved, dict) and isinstance(own, dict):
        found: dict[str, str] = {}
        for key in [*saved, *(k for k in own if k not in saved)]:
            found |= differences(saved.get(key), own.get(key), f"{name}.{key}" if name else str(key))
        return found
    return {} if saved == own else {name: f"{name} is {_short(saved)} in the checkpoint, {_short(own)} here"}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
