"""Token mixers: list them, register your own.

Put a permanent mixer into a file of `megatron/layers/`, or into a package with an entry point of the group
`megatron.layers`, so that every process of a job finds it. `register_mixer` affects the current process only.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from megatron import registry
from megatron.config import nested, values
from megatron.config.catalog import catalog
from megatron.errors import ConfigError
from megatron.layers.base import Layer

_Mixer = TypeVar("_Mixer", bound=type[Layer])


def register_mixer(cls: _Mixer) -> _Mixer:
    """Register a mixer class: its `names` for `attention_config`, its options as keys `<name>_<field>`.

    Works as a decorator. Another call with a class of the same name, as from a notebook's cell, replaces the mixer.

    Args:
        cls: a subclass of `Layer` (see `megatron/layers/base.py`). For export the class must be defined in a
            file that imports only torch, the standard library, `linear_neox` and `megatron`.

    Returns:
        The class itself.

    Raises:
        ConfigError: the class is not a mixer, has no name, or another mixer has its name.
    """
    if not (isinstance(cls, type) and issubclass(cls, Layer)):
        raise ConfigError(f"{cls!r} is not a token mixer", why="a mixer is a subclass of linear_neox.Layer")
    if not cls.names or not all(isinstance(name, str) and name.isidentifier() for name in cls.names):
        raise ConfigError(f"{cls.__name__} has no name", hint='names: ClassVar[tuple[str, ...]] = ("my_mixer",)')
    if not dataclasses.is_dataclass(cls.Config):
        raise ConfigError(f"{cls.__name__}.Config is not a dataclass", hint="@dataclass(frozen=True) class Config(LayerConfig)")
    registry.register_layer(cls)
    for cached in (catalog, nested.nested_catalog, values._adapter):
        cached.cache_clear()  # its options are new keys
    return cls


def list_mixers() -> list[str]:
    """All mixer names for `attention_config`."""
    return registry.layer_names()
