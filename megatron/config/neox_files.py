"""Which of the YAMLs in GPT-NeoX's repository run here: the facts behind `docs/neox.md`.

    python -m megatron.config.neox_files path/to/gpt-neox/configs       # judge the files and write docs/neox_files.json

The files themselves are not kept, only what is true of them: the keys that a file uses, the files it is started with, whether
it is accepted, and why not. `explain.py` makes the page out of the facts; tests hold the facts against the catalog and, where
the files are there, against the files.
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
_SITE = ("local_setup.yml",)
_ALONE: tuple[str, ...] = ()
# file -> the files it is started with, in NeoX's documents or by what it lacks; all others: local_setup.yml. Files that name
# data and folders themselves are started alone.
PARTNERS: dict[str, tuple[str, ...]] = {
    "20B.yml": _ALONE,
    "finetuning_configs/6-9B.yml": _ALONE,
    "pythia/14M.yml": _ALONE,
    "pythia/31M.yml": _ALONE,
    "llemma/7B.yml": _ALONE,
    "llama/train_config.yml": ("llama/7B.yml", *_SITE),
    "local_setup.yml": ("125M.yml",),
    "local_setup_comet.yml": ("125M.yml",),
    "local_setup_wandb.yml": ("125M.yml",),
    "eleutherai_cluster.yml": ("125M.yml",),
    "docker/pythia-paths.yml": ("pythia/70M.yml",),
    "slurm_125M.yml": ("slurm_local.yml",),
    "slurm_local.yml": ("slurm_125M.yml",),
    "prof.yml": ("125M.yml",),
    "cpu_mock_config.yml": ("125M.yml", *_SITE),
    "sparse.yml": ("125M.yml", *_SITE),
    "text_generation.yml": ("125M.yml", *_SITE),
}
# Model files without a training recipe: they take llama/train_config.yml.
_BARE = ("llama/", "llama2/", "mistral/")


def partners(name: str) -> tuple[str, ...]:
    """The files that `name` is started with."""
    if name in PARTNERS:
        return PARTNERS[name]
    return ("llama/train_config.yml", *_SITE) if name.startswith(_BARE) else _SITE


def reasons(error: ConfigError) -> list[list[str]]:
    """[what is wrong, why or else what to try] of every problem that an error lists."""
    if not re.match(r"\d+ problems", error.what):
        return [[error.what, error.why or error.hint or ""]]
    found: list[list[str]] = []
    for line in error.what.splitlines()[1:]:
        if match := re.match(r"  \d+\. (.*)", line):
            found.append([match.group(1), ""])
        elif match := re.match(r"     (?:why|try): (.*)", line):
            found[-1][1] = found[-1][1] or match.group(1)
    return found


def judge(values: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The facts of every `.yml` of `values` (file -> its keys), in order of their names."""
    with tempfile.TemporaryDirectory() as folder:
        for name, keys in values.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(keys), encoding="utf-8")
        return [_fact(name, values[name], folder) for name in sorted(values) if name.endswith(".yml")]


def _fact(name: str, keys: Mapping[str, Any], folder: str) -> dict[str, Any]:
    beside = partners(name)
    fact: dict[str, Any] = {"file": name, "with": list(beside), "accepted": True, "keys": sorted(keys)}
    # Of keys that are refused at other values: those that this file has at their default.
    unused = {key: info for key in keys if (info := catalog().get(key)) and info.status == "refused"}
    fact["at default"] = sorted(key for key, info in unused.items() if thaw(info.default) == keys[key])
    try:
        run = load_config([name, *beside], conf_dir=folder, overrides={"global_num_gpus": WORLD})
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
    problems, found = Problems(), {}
    for path in sorted(folder.rglob("*.yml")):
        found[str(path.relative_to(folder))] = read_files([path], None, problems).values
    problems.raise_if_any()
    if not found:
        raise ConfigError(f"there are no YAML files under {folder}", hint="the folder configs/ of a copy of GPT-NeoX")
    return found


def facts() -> list[dict[str, Any]]:
    """The facts that are kept."""
    kept: list[dict[str, Any]] = json.loads(FACTS.read_text(encoding="utf-8"))
    return kept


def table() -> str:
    """The facts as a table of Markdown, refused files first."""
    rows = ["| file | started with | verdict | why, or what is ignored |\n|---|---|---|---|\n"]
    for fact in sorted(facts(), key=lambda fact: (fact["accepted"], fact["file"])):
        if fact["accepted"]:
            text = "ignored: " + ", ".join(fact["ignored"]) if fact["ignored"] else ""
        else:
            text = "; ".join(f"{what} ({hint})" if hint else what for what, hint in fact["why"])
        beside = ", ".join(fact["with"]) or "alone"
        cells = (f"`{fact['file']}`", beside, "accepted" if fact["accepted"] else "refused", text.replace("|", "\\|"))
        rows.append("| " + " | ".join(cells) + " |\n")
    return "".join(rows)


def main(words: Sequence[str]) -> None:
    """Judge the files of a folder and keep the facts."""
    if len(words) != 1:
        raise ConfigError("one folder is needed", hint="python -m megatron.config.neox_files path/to/gpt-neox/configs")
    found = judge(read_folder(Path(words[0])))
    lines = ",\n".join(json.dumps(fact, ensure_ascii=False) for fact in found)
    FACTS.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    accepted = sum(fact["accepted"] for fact in found)
    print(f"wrote {FACTS}: {len(found)} files, {accepted} accepted, {len(found) - accepted} refused; now: make docs")


if __name__ == "__main__":
    with exit_on_error():
        main(sys.argv[1:])
