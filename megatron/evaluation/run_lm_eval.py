"""Runs lm-eval tasks on a model and writes what was found: task lookup, local data, few-shot settings, results.

Tasks are lm-eval's own files and the recall tasks of `evaluation/tasks`. Reading all of lm-eval's 14,000 files takes twenty
seconds, so only the folders whose files name a wanted task are read first. `data_dir` holds datasets under their hub names
(`DATA_DIR/hazyresearch/based-fda/...`, a clone of the hub's repository or files of that layout): `datasets` takes a relative
folder of that name before the hub, so loading happens with that working directory.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from megatron.errors import ConfigError, DataError, UserError
from megatron.evaluation.options import GROUPS, Request

OWN_TASKS = Path(__file__).parent / "tasks"
SEED = 1234  # lm-eval's own for drawing few-shot examples


def task_manager(names: Sequence[str], metadata: Mapping[str, Any] | None = None) -> TaskManager:
    """lm-eval's manager with the folders that define `names`; with all of its files when that does not find them.

    Raises:
        ConfigError: a name that no file defines.
    """
    home = Path(lm_eval.__file__).parent / "tasks"
    settings = dict(metadata or {})
    folders, mentioned = _folders(home, names)
    manager = TaskManager(
        include_path=[*(home / name for name in folders), OWN_TASKS], include_defaults=False, metadata=settings
    )
    missing = [name for name in names if name not in manager.task_index]
    if missing and mentioned >= set(missing):
        manager = TaskManager(include_path=OWN_TASKS, metadata=settings)
        missing = [name for name in missing if name not in manager.task_index]
    if missing:
        near = difflib.get_close_matches(missing[0], [*manager.all_tasks, *GROUPS], 4)
        hint = f"near: {', '.join(near)}" if near else f"perplexity, {', '.join(GROUPS)}, or a task of lm-eval"
        raise ConfigError(f"unknown evaluation task '{missing[0]}'", hint=hint)
    return manager


def _folders(home: Path, names: Sequence[str]) -> tuple[list[str], set[str]]:
    """(folders in which a file says `task: NAME`, `group: NAME` or carries the tag, names that any file mentions)."""
    wanted = re.compile(rf"^(?:task|group|tag)?\s*[:-]\s*[\"']?(?:{'|'.join(map(re.escape, names))})[\"']?\s*$", re.MULTILINE)
    plain = {name.encode(): name for name in names}
    found, mentioned = set(), set[str]()
    for file in home.rglob("*.yaml"):
        data = file.read_bytes()
        here = {name for raw, name in plain.items() if raw in data}
        mentioned |= here
        if here and wanted.search(data.decode(errors="replace")):
            found.add(file.relative_to(home).parts[0])
    return sorted(found), mentioned


@contextlib.contextmanager
def working_folder(folder: Path | None) -> Iterator[None]:
    """Work in `folder`, come back afterwards; None stays."""
    before = Path.cwd()
    if folder is not None:
        try:
            os.chdir(folder)
        except OSError as error:
            raise DataError("the folder of local datasets cannot be used", where=str(folder), why=error.strerror) from None
    try:
        yield
    finally:
        os.chdir(before)


def load_tasks(request: Request) -> dict[str, Any]:
    """The tasks with their data, as lm-eval's `evaluate` takes them.

    Raises:
        ConfigError: unknown task. DataError: a dataset that cannot be read.
    """
    manager = task_manager(request.names, request.metadata)
    with working_folder(request.data_dir):
        loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in request.names:
            try:
                part = manager.load([name])
            except UserError:
                raise
            except Exception as error:  # datasets, the hub and task files raise what they like
                raise DataError(
                    f"the data of task '{name}' cannot be read",
                    why=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                    hint="--data-dir DIR with the dataset under its hub name, or a connection to the hub",
                ) from error
            for kind, content in part.items():
                loaded[kind].update(content)
    for task in loaded["tasks"].values():
        shots = task.get_config("num_fewshot")
        if request.num_fewshot is not None and shots != 0:  # a task that fixes 0 is not to be given examples
            task.set_config(key="num_fewshot", value=request.num_fewshot)
        elif shots is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    return loaded


def measure(model: LM, request: Request) -> dict[str, Any] | None:
    """lm-eval's results (`results`, `n-shot`, `versions`, `samples` ...) and `recall`, the counts of the recall tasks.

    None on a replica that is not the first.
    """
    started, loaded = time.monotonic(), load_tasks(request)
    found = evaluate(model, loaded, limit=request.limit, bootstrap_iters=request.bootstrap_iters)
    if found is None:
        return None
    counts = {name: facts for name, task in loaded["tasks"].items() if (facts := counts_of(task))}
    return {**dict(found), "recall": counts, "seconds": round(time.monotonic() - started, 1)}


def counts_of(task: Task) -> dict[str, int] | None:
    """What a recall task left out; None for other tasks."""
    split = getattr(task, "dataset", {}).get("validation") if isinstance(getattr(task, "dataset", None), dict) else None
    text = "" if split is None else split.info.description
    return dict(json.loads(text)) if text else None


def summary(found: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of results as JSON: scores, versions, counts and `facts`, without the samples."""
    kept = ("results", "groups", "n-shot", "versions", "n-samples", "higher_is_better", "recall", "seconds")
    return {
        **facts,
        "lm_eval": importlib.metadata.version("lm_eval"),
        **{key: found[key] for key in kept if found.get(key)},
    }


def score_lines(found: Mapping[str, Any]) -> list[str]:
    """One line per task and metric, and one per recall task that left examples out."""
    lines = [f"{'task':<24} {'metric':<22} {'value':>10} {'stderr':>10}"]
    for name, values in found["results"].items():
        for key, value in values.items():
            metric = key.split(",")[0]
            if isinstance(value, str) or metric.endswith("_stderr") or metric in ("alias", "sample_len", "name"):
                continue
            error = values.get(key.replace(metric, f"{metric}_stderr", 1))
            shown = f"{error:>10.4f}" if isinstance(error, float) else f"{'-':>10}"
            lines.append(f"{name:<24} {metric:<22} {float(value):>10.4f} {shown}")
    for name, counts in (found.get("recall") or {}).items():
        parts = ", ".join(f"{count} {key.replace('_', ' ')}" for key, count in counts.items())
        lines.append(f"{name}: {parts}")
    return lines
