"""Folders exported under one transformers, used under another: all pairs, every family, one verdict per pair and family."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.compat.combinations import ROOT, Combination
from tools.compat.environments import NotAvailable, make_environment, python_of
from tools.compat.suite import commit, describe, environment_of_tests

Tokens = list[list[int]]


def verdict(
    expected: Mapping[str, Tokens] | str, generated: Mapping[str, Tokens] | str, first: Mapping[str, Tokens] | None
) -> str:
    """What is wrong with one family under one pair, or "equal".

    Args:
        expected: "greedy" and "greedy without cache" -> the trainer's tokens, or why the folder was not exported.
        found: way -> tokens of the folder, see `use_folders.py`, or why it could not be used.
        first: what the first pair found, None for the first.

    Returns:
        "equal", or the sentences of what differs.
    """
    if isinstance(expected, str):
        return expected
    if isinstance(generated, str):
        return f"use: {generated}"
    wrong = [
        f"{decoding} differs from the trainer's"
        for decoding in ("greedy", "greedy without cache")
        if generated[decoding] != expected[decoding]
    ]
    same_text = expected["greedy"] == expected["greedy without cache"]
    if same_text and generated["beams"] != generated["beams without cache"]:
        wrong.append("beams with and without cache differ")
    if first is not None:
        wrong += [
            f"{decoding} differ from the first pair's"
            for decoding in ("beams", "beams without cache")
            if generated[decoding] != first[decoding]
        ]
    return "; ".join(wrong) or "equal"


def _run(program: str, script: str, home: Path, *words: str) -> str | None:
    """Run a script of this folder in an environment; returns the end of its error output when it failed."""
    environment = {**environment_of_tests(), "HF_HOME": str(home)}
    command = [program, str(ROOT / "tools" / "compat" / script), *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stderr.strip().rpartition("\n")[2]


def _used(program: str, folder: Path, output: Path, families: Sequence[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Family -> what `use_folders.py` found, or why it found nothing."""
    request = json.dumps({**settings, "families": list(families)})
    error = _run(program, "use_folders.py", output.with_name(f"{output.stem}-home"), str(folder), str(output), request)
    return dict.fromkeys(families, error) if error else json.loads(output.read_text(encoding="utf-8"))


def run_cross(
    combinations: Sequence[Combination], families: Sequence[str], prompts: Sequence[str], length: int
) -> dict[str, Any]:
    """Every pair of exporting and using combination.

    Args:
        combinations: one per version of transformers.
        families: names of `families.FAMILIES`.
        prompts: texts of different lengths.
        length: most new tokens.

    Returns:
        `rows`: per pair `exported`, `used` (versions of transformers) and `families` (name -> verdict); `missing`: version ->
        why it could not be had; and facts of the run.
    """
    programs: dict[str, str] = {}
    missing: dict[str, str] = {}
    first: dict[str, dict[str, Tokens]] = {}
    for combination in combinations:
        try:
            programs[combination.transformers] = python_of(make_environment(combination))
        except NotAvailable as error:
            missing[combination.transformers] = str(error)
    rows = []
    settings = {"prompts": list(prompts), "length": length}
    with tempfile.TemporaryDirectory(prefix="cross-") as place:
        for exporter, program in programs.items():
            folder = Path(place) / exporter
            failure = _run(program, "export_folders.py", Path(place) / f"{exporter}-home", str(folder))
            expected: dict[str, Any] = dict.fromkeys(families, f"export: {failure}")
            if failure is None:
                expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
            exported = [name for name in families if not isinstance(expected[name], str)]
            for user, other in programs.items():
                generated = _used(other, folder, Path(place) / f"{exporter}-{user}.json", exported, settings)
                verdicts = {}
                for name in families:
                    tokens = generated.get(name, "not exported")
                    verdicts[name] = verdict(expected[name], tokens, first.get(name))
                    if not isinstance(tokens, str):
                        first.setdefault(name, tokens)
                rows.append({"exported": exporter, "used": user, "families": verdicts})
                print(f"exported under {exporter}, used under {user}: {verdicts}", flush=True)
    head = {key: value for key, value in describe(combinations[0]).items() if key in ("python", "torch", "date")}
    return {**head, "commit": commit(), "prompts": len(prompts), "tokens": length, "rows": rows, "missing": missing}
