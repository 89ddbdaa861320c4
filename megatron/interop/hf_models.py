"""Models that transformers' own classes can express: names and shapes of GPT-NeoX, Llama, Mistral, Bloom and MPT, both ways.

A family declares what its config cannot express (`obstacle`), the config fields of a model (`fields`), the model of a config
(`shape`), and its weight names (`Layout`). `hf_families.py` lists them. No source is packed: the export needs no
`trust_remote_code`.
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
    """Weight names in a family's state dict.

    Attributes:
        outer: our name -> theirs, outside the blocks.
        block: their prefix of block i, such as `model.layers.{}.`.
        inner: our module -> theirs within a block, without `.weight` or `.bias`.
        fused: their fused module of queries, keys and values; None if they are separate.
        by_head: the rows of the fused module are q, k, v of head 0, then of head 1, ...; else all q, all k, all v.
        ignored: suffixes of names that are not weights (buffers in older files).
    """

    outer: Mapping[str, str]
    block: str
    inner: Mapping[str, str]
    fused: str | None = None
    by_head: bool = False
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Native:
    """One family of transformers (see the module).

    Attributes:
        model_type: in config.json.
        architecture: name of its causal language model class.
        config_class: its config class.
        layout: its weight names.
        obstacle: why its config cannot express a model; None if it can.
        fields: config fields of a model.
        shape: the model of a config object.
        length_key: config field of the maximum sequence length.
    """

    model_type: str
    architecture: str
    config_class: type[Any]
    layout: Layout
    obstacle: Callable[[ModelConfig], str | None]
    fields: Callable[[ModelConfig], dict[str, Any]]
    shape: Callable[[Any], ModelConfig]
    length_key: str = "max_position_embeddings"


def options_of(config: ModelConfig) -> dict[str, Any] | str:
    """The options of all attention layers, with defaults; a sentence with the reason if they differ or others exist."""
    others = sorted(set(config.layer_types) - SOFTMAX)
    if others:
        return f"it has {', '.join(others)} layers"
    distinct = []
    for name in dict.fromkeys(config.layer_types):
        values = layer_options(config, name) | {"dropout": 0.0}
        if values not in distinct:
            distinct.append(values)
    return distinct[0] if len(distinct) == 1 else "its attention layers differ from each other"


def first_difference(values: Mapping[str, Any], required: Mapping[str, Any]) -> str | None:
    """A sentence about the first value that differs from `required`, where a set allows each member; None if all match."""
    for name, value in required.items():
        matches = values[name] in value if isinstance(value, (set, frozenset)) else values[name] == value
        if not matches:
            return f"its {name} is {values[name]}"
    return None


def obstacle_in(config: ModelConfig, model: Mapping[str, Any], attention: Mapping[str, Any]) -> str | None:
    """Why a family that requires these model fields and attention options cannot express a model; None if it can."""
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
    """Rename our full weights to a family's names."""
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            renamed[layout.outer[name]] = value
            continue
        module, _, leaf = match[2].rpartition(".")
        if layout.fused is None or not module.endswith(("q_proj", "k_proj", "v_proj")):
            renamed[f"{layout.block.format(match[1])}{layout.inner[module]}.{leaf}"] = value
        elif module.endswith("q_proj"):
            three = [weights[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            renamed[f"{layout.block.format(match[1])}{layout.fused}.{leaf}"] = _fuse(three, config.num_heads, layout.by_head)
    return renamed


def _fuse(three: list[Tensor], heads: int, by_head: bool) -> Tensor:
    if not by_head:
        return torch.cat(three)
    return torch.stack([t.unflatten(0, (heads, -1)) for t in three], dim=1).flatten(0, 2)


def from_native(layout: Layout, config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a family's weights to our names; unknown weights keep their names, so that the importer reports them."""
    outer = {theirs: ours for ours, theirs in layout.outer.items()}
    inner = {theirs: ours for ours, theirs in layout.inner.items()}
    block = re.compile(re.escape(layout.block).replace(r"\{\}", r"(\d+)") + r"(.+)\.(weight|bias)")
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        match = block.fullmatch(name)
        if name in outer:
            renamed[outer[name]] = value
        elif name.endswith(layout.ignored) and layout.ignored:
            continue
        elif match is not None and match[2] == layout.fused:
            parts = _split(value, config.num_heads, layout.by_head)
            stem = f"model.layers.{match[1]}.token_mixer"
            renamed |= {f"{stem}.{letter}_proj.{match[3]}": t for letter, t in zip("qkv", parts, strict=True)}
        elif match is not None and match[2] in inner:
            renamed[f"model.layers.{match[1]}.{inner[match[2]]}.{match[3]}"] = value
        else:
            renamed[name] = value
    return renamed


def _split(value: Tensor, heads: int, by_head: bool) -> list[Tensor]:
    if not by_head:
        return list(value.chunk(3))
    return [t.flatten(0, 1) for t in value.unflatten(0, (heads, 3, -1)).unbind(1)]


def read_native(
    family: Native, settings: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[ModelConfig, dict[str, Tensor], list[str]]:
    """Read a folder of one of transformers' families.

    Returns:
        (model config, weights under our names, notes).

    Raises:
        ExportError: config.json has a feature that is not supported.
    """
    config_fields = {name: value for name, value in settings.items() if name not in ("model_type", "auto_map", "architectures")}
    theirs = foreign_settings(family.config_class, config_fields)
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
