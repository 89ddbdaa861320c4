"""What is known about entries of dictionaries, by dotted names such as `optimizer.params.lr`."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from megatron.config import key_types
from megatron.config.catalog import KeyInfo, catalog
from megatron.config.frozen import freeze
from megatron.config.neox_keys import NestedKey, nested_keys, open_dictionaries
from megatron.config.yaml_reader import Source

_LARGEST = 2**63 - 1
_BETAS = tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]


@functools.cache
def nested_catalog() -> dict[str, KeyInfo]:
    """Dotted name -> what is known about it, for all entries of all dictionaries."""
    return {f"{entry.key}.{entry.name}": _info(entry) for entry in nested_keys()}


def _info(entry: NestedKey) -> KeyInfo:
    outer = catalog()[entry.key]
    return replace(
        outer,
        name=f"{entry.key}.{entry.name}",
        annotation=_BETAS if entry.kind == "Betas" else key_types.parse_type(entry.kind),
        limits=() if entry.least is None else (Field(ge=entry.least, le=entry.largest),),
        default=freeze(entry.default),
        doc=entry.doc,
    )


def names_inside(dotted: str) -> tuple[str, ...]:
    """Names of the entries right inside a dictionary."""
    inside = (name.removeprefix(f"{dotted}.") for name in nested_catalog() if name.startswith(f"{dotted}."))
    return tuple(name for name in inside if "." not in name)


def is_open(dotted: str) -> bool:
    """May this dictionary have entries that are not in the table?"""
    return dotted in open_dictionaries() or any(dotted.startswith(f"{name}.") for name in open_dictionaries())


def find(dotted: str) -> KeyInfo | None:
    """What is known about a flat key, or about an entry of a dictionary."""
    return nested_catalog().get(dotted) if "." in dotted else catalog().get(dotted)


def place_of(source: Source, dotted: str) -> str:
    """`file:line` of a dotted name; else of an entry of it, or of the dictionary that it is in."""
    if dotted in source.places:
        return source.places[dotted]
    inside = [place for name, place in source.places.items() if name.startswith(f"{dotted}.")]
    outer = dotted.rpartition(".")[0]
    return inside[0] if inside else place_of(source, outer) if outer else ""


def odd_numbers(dotted: str, value: Any) -> Iterator[tuple[str, str]]:
    """(dotted name, what is wrong) of each number that is not finite or too large, at any depth."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from odd_numbers(f"{dotted}.{name}", inner)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from odd_numbers(f"{dotted}[{index}]", inner)
    elif isinstance(value, float) and not math.isfinite(value):
        yield dotted, f"{dotted} is {value}, which is not a finite number"
    elif isinstance(value, int) and abs(value) > _LARGEST:
        yield dotted, f"{dotted} is a number of {len(str(abs(value)))} digits; at most {_LARGEST} can be counted"
