"""Reads `neox_keys.tsv`: every key of GPT-NeoX, with what becomes of it here.

A user's old YAML must be read whole: a key is implemented, ignored with one warning (it has no effect on the result), or
refused with a reason (it would change the mathematics and is not built). The table is that promise; `tests/config` compares
names, types and defaults with the 318 keys of the original, and `explain.py` prints it as a page.

`[GROUP]` starts a group, `#` a comment; other lines are rows of tab-separated columns. Types and defaults are NeoX's; where a
section has a field of that name, the field's count. `@NAME` as last column stands for a reason of the group `reasons`: one that
several keys share is written once. Entries of dictionaries follow: those without effect are DeepSpeed's own names, so that a
misspelling of one is reported as any other.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

Status = Literal["implemented", "ignored", "refused", "alias"]

NO_EFFECT = "Without effect here."
_FILE = Path(__file__).with_name("neox_keys.tsv")
_OTHER_GROUPS = ("older NeoX", "refused values", "inside dictionaries", "dictionaries with free names")


class NeoxKey(NamedTuple):
    """One key of NeoX.

    Attributes:
        name: the flat key.
        kind: NeoX's type, as text.
        default: NeoX's default.
        status: what becomes of it; an alias is another spelling of `reason`.
        doc: one sentence.
        reason: why it is ignored or refused and what to use instead, or the target of an alias.
    """

    name: str
    kind: str
    default: Any
    status: Status
    doc: str
    reason: str = ""


class NestedKey(NamedTuple):
    """One entry of a dictionary.

    Attributes:
        key: the flat key whose value the dictionary is.
        name: dotted name inside it.
        kind: type, as text.
        default: its default.
        least: the smallest number that is allowed, None for any.
        largest: the largest one; only with `least`.
        doc: one sentence.
    """

    key: str
    name: str
    kind: str
    default: Any
    least: float | None
    largest: float | None
    doc: str


@functools.cache
def _groups() -> dict[str, list[list[str]]]:
    """Group -> the cells of its rows."""
    groups: dict[str, list[list[str]]] = {}
    reasons: dict[str, str] = {}
    for line in _FILE.read_text(encoding="utf-8").splitlines():
        cells = line.split("\t")
        if line.startswith("["):
            rows = groups.setdefault(line[1:-1], [])
        elif line.startswith("@"):
            reasons[cells[0]] = cells[1]
        elif not line.startswith("#"):
            rows.append([*cells[:-1], reasons.get(cells[-1], cells[-1])])
    return groups


def _keys(rows: list[list[str]]) -> dict[str, NeoxKey]:
    return {row[0]: NeoxKey(row[0], row[1], json.loads(row[2]), *row[3:]) for row in rows}  # type: ignore[arg-type]


@functools.cache
def neox_keys() -> dict[str, NeoxKey]:
    """Name -> row of every key of GPT-NeoX."""
    return _keys([row for group, rows in _groups().items() if group not in _OTHER_GROUPS for row in rows])


def older_keys() -> dict[str, NeoxKey]:
    """Name -> row of the keys and spellings that only older NeoX files use, such as Pythia's."""
    return _keys(_groups()["older NeoX"])


@functools.cache
def refused_values() -> dict[str, dict[str, str]]:
    """Implemented key -> value that is not built -> why, and what to use."""
    refused: dict[str, dict[str, str]] = {}
    for key, value, reason in _groups()["refused values"]:
        refused.setdefault(key, {})[value] = reason
    return refused


def nested_keys() -> Iterator[NestedKey]:
    """Every entry of the dictionaries, in the order of the table."""
    for key, names, kind, default, *rest in _groups()["inside dictionaries"]:
        bounds, doc = [*rest, "", ""][:2]
        least, largest = (json.loads(bound or "null") for bound in bounds.partition("..")[::2])
        for name in names.split():
            yield NestedKey(key, name, kind, json.loads(default), least, largest, doc or NO_EFFECT)


@functools.cache
def open_dictionaries() -> frozenset[str]:
    """Dotted names of the dictionaries that may hold any name."""
    return frozenset(name for names, _ in _groups()["dictionaries with free names"] for name in names.split())
