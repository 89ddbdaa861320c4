"""The resolved form of a model config, in which every option is explicit: configs are compared in this form.

A `ModelConfig` contains the options that the user set. A default may be explicit or omitted, follow from another field
(`kv_heads`), or have no effect (a rotary base without rotation), and a mixer may have several names: configs of equal models
may differ. Their resolved forms are equal if and only if the models compute the same from the same weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from megatron.errors import UserError
from megatron.layers.base import LayerConfig
from megatron.model.config import ModelConfig
from megatron.registry import layer_class, layer_info

_COMMON = frozenset(f.name for f in fields(LayerConfig))
_SAME_FUNCTION = {"swish": "silu"}


def basic_name(name: str) -> str:
    """The first name of a mixer, or of the mixer of which it only changes defaults: `flash` and `alibi` are `global`."""
    for cls, base in itertools.pairwise(layer_class(name).__mro__):
        own = {n for n in vars(cls) if not n.startswith("_")}
        if not own <= {"names", "Config"} or not getattr(base, "names", ()):
            return str(cls.names[0])
    raise AssertionError("no mixer is its own base")


def layer_options(config: ModelConfig, name: str) -> dict[str, Any]:
    """All options of the layers called `name` of a model, resolved.

    Raises:
        TypeError: the mixer does not have one of the options.
    """
    cls = layer_class(name)
    written = config.layer_options.get(layer_info(name).names[0], {})
    options = cls.Config(config.hidden_size, config.num_heads, **written).resolved()
    return {f.name: getattr(options, f.name) for f in fields(options) if f.name not in _COMMON}


def resolved(config: ModelConfig) -> dict[str, Any]:
    """The model as JSON types: all fields, `layer_options` with every option of every mixer that it has.

    Raises:
        ConfigError: a mixer is unknown.
        TypeError: a mixer does not have one of its options.
    """
    values = config.to_dict() | {"activation": _SAME_FUNCTION.get(config.activation, config.activation)}
    options = {name: layer_options(config, name) for name in dict.fromkeys(config.layer_types)}
    basic = {name: basic_name(name) for name in options}
    differ = any(basic[a] == basic[b] and options[a] != options[b] for a in options for b in options)
    names = {name: layer_info(name).names[0] for name in options} if differ else basic
    values["layer_types"] = [names[name] for name in config.layer_types]
    values["layer_options"] = {names[name]: values_of for name, values_of in options.items()}
    if config.mlp == "none":
        values |= {"mlp_width": 0, "activation": "silu", "mlp_bias": False}
    if not any(layer_info(name).uses_heads for name in options):
        values["num_heads"] = 1
    return values


def resolved_or_as_it_is(values: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved form of a stored config; unchanged if it contains something that this release does not know."""
    try:
        return resolved(ModelConfig.from_dict(values))
    except (UserError, TypeError, ValueError, KeyError, AttributeError):
        return dict(values)
