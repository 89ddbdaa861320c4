"""Models that the classes of transformers express: names and shapes of GPT-NeoX, Llama, Mistral, Bloom and MPT, both ways.

A family here says what its config can hold (`obstacle`), which config fields a model has (`fields`), which model a config
describes (`shape`), and how weights are called there (`Layout`). `hf_families.py` lists them. Nothing is packed: an export
needs no `trust_remote_code`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from megatron.errors import ExportError
from megatron.interop.weight_files import foreign_settings
from megatron.model.config import ModelConfig
from megatron.model.resolved import layer_options

SOFTMAX = frozenset({"global", "flash", "alibi"})
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Layout:
    """Where weights stand in a family's state dict.

    outer: our name -> theirs, outside the blocks. block: their prefix of block i, such as `model.layers.{}.`. inner: our module
    -> theirs within a block (`.weight` and `.bias` follow). fused: their one module of queries, keys and values, None when they
    are apart. by_head: the rows of the fused one are q, k, v of head 0, then of head 1, ...; else all q, all k, all v.
    ignored: endings of names that are no weights (tables of older files).
    """

    outer: Mapping[str, str]
    block: str
    inner: Mapping[str, str]
    fused: str | None = None
    by_head: bool = False
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Native:
    """One family of transformers; see the head of this file. architecture: its class; length_key: its longest text."""

    model_type: str
    architecture: str
    config_class: type[Any]
    layout: Layout
    obstacle: Callable[[ModelConfig], str | None]
    fields: Callable[[ModelConfig], dict[str, Any]]
    shape: Callable[[Any], ModelConfig]
    length_key: str = "max_position_embeddings"


def options_of(config: ModelConfig) -> dict[str, Any] | str:
    """The options that all attention layers share, defaults included; a sentence where there is no such thing."""
    others = sorted(set(config.layer_types) - SOFTMAX)
    if others:
        return f"it has {', '.join(others)} layers"
    found = []
    for name in dict.fromkeys(config.layer_types):
        values = layer_options(config, name) | {"dropout": 0.0}
        if values not in found:
            found.append(values)
    return found[0] if len(found) == 1 else "its attention layers differ from each other"


def first_difference(have: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """A sentence on the first entry of `wanted` that `have` does not equal; a set stands for its members."""
    for name, value in wanted.items():
        good = have[name] in value if isinstance(value, (set, frozenset)) else have[name] == value
        if not good:
            return f"its {name} is {have[name]}"
    return None


def obstacle_in(config: ModelConfig, model: Mapping[str, Any], attention: Mapping[str, Any]) -> str | None:
    """Why a family that wants these fields of the model and these attention options cannot hold it; None when it can."""
    options = options_of(config)
    if isinstance(options, str):
        return options
    plain: dict[str, Any] = {
        "learned_positions": 0,
        "embedding_norm": False,
        "embedding_scale": False,
        "parallel_residual": False,
    }
    plain |= {"shared_norm": False, "residual_fp32": False}
    usual: dict[str, Any] = {"qk_norm": False, "window": None, "kv_heads": config.num_heads}
    if options["positions"] == "alibi":
        usual |= {"train_length": None, "slope_factor": 1.0}
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return first_difference(values, {**plain, **model}) or first_difference(options, {**usual, **attention})


def to_native(layout: Layout, config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our full weights under their names."""
    made: dict[str, Tensor] = {}
    for name, value in weights.items():
        found = _LAYER.fullmatch(name)
        if found is None:
            made[layout.outer[name]] = value
            continue
        module, _, leaf = found[2].rpartition(".")
        if layout.fused is None or not module.endswith(("q_proj", "k_proj", "v_proj")):
            made[f"{layout.block.format(found[1])}{layout.inner[module]}.{leaf}"] = value
        elif module.endswith("q_proj"):
            three = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            made[f"{layout.block.format(found[1])}{layout.fused}.{leaf}"] = _fuse(three, config.num_heads, layout.by_head)
    return made


def _fuse(three: list[Tensor], heads: int, by_head: bool) -> Tensor:
    if not by_head:
        return torch.cat(three)
    return torch.stack([t.unflatten(0, (heads, -1)) for t in three], dim=1).flatten(0, 2)


def from_native(layout: Layout, config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their weights under our names; what the layout does not know keeps its name, so that the importer reports it."""
    outer = {theirs: ours for ours, theirs in layout.outer.items()}
    inner = {theirs: ours for ours, theirs in layout.inner.items()}
    block = re.compile(re.escape(layout.block).replace(r"\{\}", r"(\d+)") + r"(.+)\.(weight|bias)")
    made: dict[str, Tensor] = {}
    for name, value in weights.items():
        found = block.fullmatch(name)
        if name in outer:
            made[outer[name]] = value
        elif name.endswith(layout.ignored) and layout.ignored:
            continue
        elif found is not None and found[2] == layout.fused:
            parts = _split(value, config.num_heads, layout.by_head)
            stem = f"model.layers.{found[1]}.token_mixer"
            made |= {f"{stem}.{part}_proj.{found[3]}": t for part, t in zip("qkv", parts, strict=True)}
        elif found is not None and found[2] in inner:
            made[f"model.layers.{found[1]}.{inner[found[2]]}.{found[3]}"] = value
        else:
            made[name] = value
    return made


def _split(value: Tensor, heads: int, by_head: bool) -> list[Tensor]:
    if not by_head:
        return list(value.chunk(3))
    return [t.flatten(0, 1) for t in value.unflatten(0, (heads, 3, -1)).unbind(1)]


def read_native(
    family: Native, settings: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[ModelConfig, dict[str, Tensor], list[str]]:
    """A folder of this family as a model of ours: its shape, its weights under our names, and notes.

    Raises:
        ExportError: config.json asks for something that the family's plain form does not have.
    """
    said = {name: value for name, value in settings.items() if name not in ("model_type", "auto_map", "architectures")}
    theirs = foreign_settings(family.config_class, said)
    try:
        config = family.shape(theirs)
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise ExportError(f"this {family.architecture} cannot be imported", why=str(error)) from None
    renamed = from_native(family.layout, config, weights)
    if config.tie_embeddings:
        renamed.pop("lm_head.weight", None)
    rows = renamed.get("model.embed_tokens.weight")
    notes = [f"layout of {family.architecture}"]
    if rows is not None and len(rows) != config.vocab_size:
        notes.append(f"vocabulary: {len(rows)} rows, read from the tensors (config.json says {config.vocab_size})")
        config = replace(config, vocab_size=len(rows))
    return config, renamed, notes
