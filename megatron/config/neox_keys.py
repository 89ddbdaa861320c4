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

_TABLE = Path(__file__).with_name("neox_keys.tsv")
_OLDER = "older NeoX"  # keys and spellings of files in NeoX's repository that NeoX itself no longer knows


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


@functools.cache
def _tables() -> tuple[dict[str, NeoxKey], dict[str, NeoxKey]]:
    """The keys of NeoX, and those of older files, by name in the order of the table."""
    current: dict[str, NeoxKey] = {}
    older: dict[str, NeoxKey] = {}
    reasons: dict[str, str] = {}
    rows = current
    for line in _TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            rows = older if line == f"[{_OLDER}]" else current
        elif line.startswith("@"):
            name, _, reasons[name] = line.partition("\t")
        elif not line.startswith("#"):
            name, kind, default, status, doc, *reason = line.split("\t")
            why = reasons[reason[0]] if reason and reason[0].startswith("@") else "".join(reason)
            rows[name] = NeoxKey(name, kind, json.loads(default), status, doc, why)  # type: ignore[arg-type]
    return current, older


def neox_keys() -> dict[str, NeoxKey]:
    """Name -> row of every key of GPT-NeoX."""
    return _tables()[0]


def older_keys() -> dict[str, NeoxKey]:
    """Name -> row of the keys that only older NeoX files use; `old_keys.py` translates those that need another key's value."""
    return _tables()[1]
