"""The list of all keys of a YAML: NeoX's, ours, and the options of every token mixer.

The reader, `--explain`, the generated pages and the editor schema all use this list, so they cannot disagree.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from megatron import registry
from megatron.config import key_types
from megatron.config.neox_keys import NeoxKey, Status, neox_keys, older_keys
from megatron.config.schema import key_fields


@dataclass(frozen=True)
class KeyInfo:
    """What is known about one flat key.

    Attributes:
        name: the flat key.
        section: section of `RunConfig`, `layers`, or empty for keys without one.
        annotation: the type.
        limits: pydantic's constraints besides the type (`gt=0`, read-only dictionaries).
        default: the default here.
        status: implemented, ignored, refused or alias.
        doc: one sentence.
        reason: for ignored and refused keys; the target of an alias.
        origin: `NeoX`, `ours`, `older NeoX` or `mixer NAME`.
    """

    name: str
    section: str
    annotation: Any
    limits: tuple[Any, ...]
    default: Any
    status: Status
    doc: str
    reason: str
    origin: str

    @property
    def type_name(self) -> str:
        """The type in words."""
        return key_types.type_name(self.annotation)

    @property
    def status_text(self) -> str:
        """The status with its reason."""
        if self.status == "alias":
            return f"alias of {self.reason}"
        return f"{self.status}: {self.reason}" if self.reason else self.status

    @property
    def layer_field(self) -> str:
        """For a mixer's option the field of its `Config`: `metala_gate_round` -> `gate_round`."""
        return self.name[len(self.section_layer) + 1 :]

    @property
    def section_layer(self) -> str:
        """For a mixer's option the mixer's name."""
        return self.origin.removeprefix("mixer ") if self.section == "layers" else ""


# Upper bounds of mixers' sizes that multiply the width of the model; the others are lengths.
_LARGEST = {"conv_width": 1 << 10, "expand": 1 << 10, "feature_width": 1 << 10, "state_size": 1 << 14, "heads": 1 << 16}
# Bounds of mixers' options that are not sizes.
_BOUNDS = {
    "dropout": Field(ge=0, lt=1),
    "rotary_fraction": Field(ge=0, le=1),
    "rotary_base": Field(gt=0),
    "bias_max": Field(gt=0),
    "slope_factor": Field(gt=0),
}


@functools.cache
def catalog() -> dict[str, KeyInfo]:
    """Every known key, sections first in their order, then keys without a section, then mixers' options."""
    keys: dict[str, KeyInfo] = {}
    neox = neox_keys()
    for name, field in key_fields().items():
        row = neox.get(name) or NeoxKey(name, "", None, "implemented", field.info.description or "")
        limits = tuple(field.info.metadata)
        keys[name] = _info(row, field.section, field.info.annotation, limits, field.default, "NeoX" if name in neox else "ours")
    for rows, origin in ((neox, "NeoX"), (older_keys(), "older NeoX")):
        for row in rows.values():
            if row.name not in keys:
                keys[row.name] = _info(row, "", key_types.parse_type(row.kind), (), row.default, origin)
    _add_layer_options(keys)
    return keys


def _info(row: NeoxKey, section: str, annotation: Any, limits: tuple[Any, ...], default: Any, origin: str) -> KeyInfo:
    return KeyInfo(row.name, section, annotation, limits, default, row.status, row.doc, row.reason, origin)


def _add_layer_options(keys: dict[str, KeyInfo]) -> None:
    """Mixers' options; they replace a NeoX key of the same name that has no section (`mamba_use_bias_in_conv`)."""
    for layer, options in registry.layer_options().items():
        for field, option in options.items():
            name = f"{layer}_{field}"
            if name in keys and keys[name].section:
                continue
            row = NeoxKey(name, option.type, option.default, "implemented", option.doc)
            kind = key_types.parse_type(option.type)
            limits = _limits(field, kind, option.default)
            keys[name] = _info(row, "layers", kind, limits, option.default, f"mixer {layer}")


def _limits(field: str, kind: Any, default: Any) -> tuple[Any, ...]:
    """Bounds of a mixer's option. A whole number is at least 1, or 0 where that is the default and means "not given"."""
    if field in _BOUNDS and key_types.accepts(kind, float):
        return (_BOUNDS[field],)
    if key_types.accepts(kind, int) and not key_types.accepts(kind, str):
        return (Field(ge=0 if default == 0 else 1, le=_LARGEST.get(field, 1 << 24)),)
    return ()
