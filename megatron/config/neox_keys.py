"""Reads `neox_keys.tsv`: every key of GPT-NeoX, with what becomes of it here.

A user's old YAML must be read whole: a key is implemented, ignored with one warning (it has no effect on the result), or
refused with a reason (it would change the mathematics and is not built). The table is that promise; `tests/config` compares
names, types and defaults with the 318 keys of the original, and `explain.py` prints it as a page.

A line is a row of tab-separated columns, `[GROUP]` starts a group, `#` a comment. Types and defaults are NeoX's; if a section
has a field of that name, the field's count. `@NAME` in the last column stands for a reason of the group `reasons`: one that
several keys share is written once.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

Status = Literal["implemented", "ignored", "refused", "alias"]

_FILE = Path(__file__).with_name("neox_keys.tsv")


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


class _Tables(NamedTuple):
    keys: dict[str, NeoxKey]
    older: dict[str, NeoxKey]
    refused_values: dict[str, dict[str, str]]


@functools.cache
def _tables() -> _Tables:
    """The groups of the file, in its order."""
    tables, reasons = _Tables({}, {}, {}), dict[str, str]()
    group = ""
    for line in _FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            group = line[1:-1]
            continue
        name, *cells = line.split("\t")
        if name.startswith(("#", "@")):
            reasons[name] = "".join(cells)
            continue
        cells[-1] = reasons.get(cells[-1], cells[-1])
        if group == "refused values":
            tables.refused_values.setdefault(name, {})[cells[0]] = cells[1]
        else:
            kind, default, status, *texts = cells
            rows = tables.older if group == "older NeoX" else tables.keys
            rows[name] = NeoxKey(name, kind, json.loads(default), status, *texts)  # type: ignore[arg-type]
    return tables


def neox_keys() -> dict[str, NeoxKey]:
    """Name -> row of every key of GPT-NeoX."""
    return _tables().keys


def older_keys() -> dict[str, NeoxKey]:
    """Name -> row of the keys and spellings that only older NeoX files use, such as Pythia's."""
    return _tables().older


def refused_values() -> dict[str, dict[str, str]]:
    """Implemented key -> value that is not built -> why, and what to use."""
    return _tables().refused_values
