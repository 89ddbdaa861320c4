"""Which of the YAMLs in GPT-NeoX's repository run here: the facts of `docs/neox.md`.

    python -m megatron.config.neox_files path/to/gpt-neox/configs       # judge the files and write docs/neox_files.json

The files are not part of this project. What is recorded of each: the keys that it uses, the files it is started with, whether
it is accepted, and why not. `pages.py` turns the facts into a page; tests compare them with the catalog.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.config.catalog import catalog
from megatron.config.frozen import thaw
from megatron.config.load import load_config
from megatron.config.problems import Problems
from megatron.config.yaml_reader import read_files
from megatron.errors import ConfigError, exit_on_error

FACTS = Path(__file__).resolve().parents[2] / "docs" / "neox_files.json"
WORLD = 8


def facts() -> list[dict[str, Any]]:
    """The recorded facts."""
    recorded: list[dict[str, Any]] = json.loads(FACTS.read_text(encoding="utf-8")) if FACTS.exists() else []
    return recorded


def partners(name: str) -> list[str]:
    """The files that `name` is started with: those of its record, which a person may edit; for a new file local_setup.yml."""
    return next((fact["with"] for fact in facts() if fact["file"] == name), ["local_setup.yml"])


def reasons(error: ConfigError) -> list[list[str]]:
    """[what is wrong, why or else what to try] of every problem that an error lists."""
    if not re.match(r"\d+ problems", error.what):
        return [[error.what, error.why or error.hint or ""]]
    pairs: list[list[str]] = []
    for line in error.what.splitlines()[1:]:
        if match := re.match(r"  \d+\. (.*)", line):
            pairs.append([match.group(1), ""])
        elif match := re.match(r"     (?:why|try): (.*)", line):
            pairs[-1][1] = pairs[-1][1] or match.group(1)
    return pairs


def judge(values: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The facts of every `.yml` of `values` (file -> its keys), in order of their names."""
    with tempfile.TemporaryDirectory() as folder:
        for name, keys in values.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(keys), encoding="utf-8")
        return [_fact(name, values[name], folder) for name in sorted(values) if name.endswith(".yml")]


def _fact(name: str, keys: Mapping[str, Any], folder: str) -> dict[str, Any]:
    others = partners(name)
    fact: dict[str, Any] = {"file": name, "with": others, "accepted": True, "keys": sorted(keys)}
    # Of keys that are refused at other values: those that this file has at their default.
    unused = {key: info for key in keys if (info := catalog().get(key)) and info.status == "refused"}
    fact["at default"] = sorted(key for key, info in unused.items() if thaw(info.default) == keys[key])
    try:
        run = load_config([name, *others], conf_dir=folder, overrides={"global_num_gpus": WORLD})
        fact["ignored"] = sorted(line.split(" ", 1)[0] for line in run.warnings if line.split(" ", 1)[0] in keys)
    except ConfigError as error:
        # Names of known mixers are left out: they grow with every new one.
        listed = [[what, "" if hint.startswith(("known:", "did you mean")) else hint] for what, hint in reasons(error)]
        fact["accepted"], fact["why"] = False, listed
        fact["deciding"] = {key: keys[key] for text, _ in fact["why"] if (key := text.partition(":")[0]) in keys}
    return fact


def read_folder(folder: Path) -> dict[str, dict[str, Any]]:
    """File -> its keys, of all `.yml` under `folder`.

    Raises:
        ConfigError: a file cannot be read, or there is none.
    """
    problems = Problems()
    values = {
        str(path.relative_to(folder)): read_files([path], None, problems).values for path in sorted(folder.rglob("*.yml"))
    }
    problems.raise_if_any()
    if not values:
        raise ConfigError(f"there are no YAML files under {folder}", hint="the folder configs/ of a copy of GPT-NeoX")
    return values


def table() -> str:
    """The facts as a table of Markdown, refused files first."""
    rows = ["| file | started with | verdict | why, or what is ignored |\n|---|---|---|---|\n"]
    for fact in sorted(facts(), key=lambda fact: (fact["accepted"], fact["file"])):
        if fact["accepted"]:
            text = "ignored: " + ", ".join(fact["ignored"]) if fact["ignored"] else ""
        else:
            text = "; ".join(f"{what} ({hint})" if hint else what for what, hint in fact["why"])
        others = ", ".join(fact["with"]) or "alone"
        cells = (f"`{fact['file']}`", others, "accepted" if fact["accepted"] else "refused", text.replace("|", "\\|"))
        rows.append("| " + " | ".join(cells) + " |\n")
    return "".join(rows)


def main(words: Sequence[str]) -> None:
    """Judge the files of a folder and record the facts."""
    if len(words) != 1:
        raise ConfigError("one folder is needed", hint="python -m megatron.config.neox_files path/to/gpt-neox/configs")
    judged = judge(read_folder(Path(words[0])))
    lines = ",\n".join(json.dumps(fact, ensure_ascii=False) for fact in judged)
    FACTS.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    accepted = sum(fact["accepted"] for fact in judged)
    print(f"wrote {FACTS}: {len(judged)} files, {accepted} accepted, {len(judged) - accepted} refused; now: make docs")


if __name__ == "__main__":
    with exit_on_error():
        main(sys.argv[1:])
