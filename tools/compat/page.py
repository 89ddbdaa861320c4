"""docs/compatibility.md, made of benchmarks/results/compatibility.json and of nothing else."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from tools.compat.combinations import OTHERS, SUITE

_HEAD = """# What was proved with what

Made by `python tools/compatibility.py`, which also writes `benchmarks/results/compatibility.json`; not written by hand. A row
is a virtual environment of its own with exactly these versions, in which the suite's compatibility part ran: {suite}.

`requirements/requirements.txt` admits what stands here and nothing newer; [CONTRIBUTING.md](../CONTRIBUTING.md) says how to
move an end of a range. Everything ran on a CPU, also where the torch is a CUDA build (PyPI has no other for Linux). *Others*
says where the versions of all other packages come from: {others}. What torch or transformers forbid gives way. A commit with
`+` had uncommitted changes beside it.
"""
_CROSS = """
## Folders from one transformers to another

Each family's folder is exported under the transformers of the row and used under that of the column: {prompts} prompts in one
batch padded on the left, {tokens} new tokens each, fp64. "Equal" says that the greedy tokens with the cache are those of the
trainer's own decode, those without the cache are the trainer's when it runs the whole text again for each token, and beams with
the cache and without it are the same under every pair; and equal to each other, where the trainer's two ways are (JRT's differ
for prompts shorter than its prefix, which then grows with the text). Python {python}, torch {torch}, {date}, commit {commit}.
Families: {families}.
"""


def _filled(text: str) -> str:
    """Paragraphs in lines of at most 126 characters."""
    paragraphs = (textwrap.fill(p, 126, break_on_hyphens=False, break_long_words=False) for p in text.strip().split("\n\n"))
    return "\n\n".join(paragraphs) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _suite_row(row: Mapping[str, Any]) -> list[str]:
    first = [row["python"], row["torch"], row["transformers"], row["others"]]
    if "unavailable" in row:
        return [*first, "not to be had", "", "", row["date"], row["commit"]]
    return [*first, *(str(row[n]) for n in ("passed", "failed", "skipped")), row["date"], row["commit"]]


def _details(row: Mapping[str, Any]) -> str:
    name = f"Python {row['python']}, torch {row['torch']}, transformers {row['transformers']}, {row['others']}"
    if "unavailable" in row:
        return f"- {name}: {row['unavailable']}"
    versions = ", ".join(f"{n} {v}" for n, v in row["versions"].items() if n != "transformers")
    text = f"- {name}: {versions}; {row['seconds']} s."
    text += "".join(f"\n  - failed: `{test}`" for test in row["failures"])
    for again in row.get("again", ()):
        text += "".join(f"\n  - passed when run again ({again['date']}, {again['commit']}): `{t}`" for t in again["passed"])
    return text


def _cross(cross: Mapping[str, Any]) -> list[str]:
    rows, versions = cross["rows"], sorted({row["used"] for row in cross["rows"]}, key=release)
    cells, wrong = [], []
    for exporter in sorted({row["exported"] for row in rows}, key=release):
        line = [f"exported under {exporter}"]
        for user in versions:
            outcomes = next(row["families"] for row in rows if (row["exported"], row["used"]) == (exporter, user))
            bad = {name: outcome for name, outcome in outcomes.items() if outcome != "equal"}
            line.append(f"{len(outcomes) - len(bad)} of {len(outcomes)} equal")
            wrong += [f"- {name}, {exporter} to {user}: {outcome}" for name, outcome in bad.items()]
        cells.append(line)
    families = ", ".join(dict.fromkeys(name for row in rows for name in row["families"]))
    parts = ["\n" + _filled(_CROSS.format(**cross, families=families))]
    parts.append(_table(["", *(f"used under {v}" for v in versions)], cells))
    missing = [f"- transformers {version}: {reason}" for version, reason in cross["missing"].items()]
    return [*parts, *(["\n".join([*wrong, *missing]) + "\n"] if wrong or missing else [])]


def release(version: str) -> tuple[int, ...]:
    """A release as numbers, for sorting: `5.24.0` is (5, 24, 0)."""
    return tuple(int(field) for field in version.split(".") if field.isdigit())


def page(results: Mapping[str, Any]) -> str:
    """The page's text.

    Args:
        results: `rows` as `suite.run_suite` gives them, and `cross` as `cross.run_cross` does, or None.

    Returns:
        Markdown that ends with a line break.
    """
    rows = sorted(results["rows"], key=lambda r: (release(r["transformers"]), release(r["torch"]), release(r["python"])))
    head = ["Python", "torch", "transformers", "others", "passed", "failed", "skipped", "date", "commit"]
    suite = ", ".join(f"`{path}`" for path in SUITE)
    others = "; ".join(f"*{name}*: {meaning}" for name, meaning in OTHERS.items())
    parts = [_filled(_HEAD.format(suite=suite, others=others)), _table(head, [_suite_row(row) for row in rows])]
    parts.append("Versions in each environment:\n\n" + "\n".join(_details(row) for row in rows) + "\n")
    if results.get("cross"):
        parts += _cross(results["cross"])
    return "\n".join(parts)
