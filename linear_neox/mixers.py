"""Token mixers: which there are, and one of your own.

A mixer that is to stay goes into a file of `megatron/layers/`, or into a package with an entry point of the group
`megatron.layers`: every process of a job then knows it. `register_mixer` is for the process it is called in.
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
    """Make a mixer class known under its `names`: in `attention_config`, and with its options as keys `<name>_<field>`.

    May be used as a decorator. Calling it again with a newer class of the same name, as a notebook's cell does, replaces it.

    Args:
        cls: a subclass of `Layer` (the contract stands in `megatron/layers/base.py`). To be exported its class must lie in a
            file, and its file may import torch, Python's own modules, `linear_neox` and `megatron` only.

    Returns:
        The class itself.

    Raises:
        ConfigError: it is no mixer, has no name, or another mixer has that name.
    """
    if not (isinstance(cls, type) and issubclass(cls, Layer)):
        raise ConfigError(f"{cls!r} is no token mixer", why="a mixer is a subclass of linear_neox.Layer")
    if not cls.names or not all(isinstance(name, str) and name.isidentifier() for name in cls.names):
        raise ConfigError(f"{cls.__name__} has no name", hint='names: ClassVar[tuple[str, ...]] = ("my_mixer",)')
    if not dataclasses.is_dataclass(cls.Config):
        raise ConfigError(f"{cls.__name__}.Config is no dataclass", hint="@dataclass(frozen=True) class Config(LayerConfig)")
    registry.register_layer(cls)
    for cached in (catalog, nested.nested_catalog, values._adapter):
        cached.cache_clear()  # its options are keys now
    return cls


def list_mixers() -> list[str]:
    """Every name that may stand in `attention_config`."""
    return registry.layer_names()
