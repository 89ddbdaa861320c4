"""Many models x many tasks of lm-eval, one process per device, one result file per model and task; start again to go on.

    python tools/launch_eval.py --model runs/a/checkpoints hf/b --task recall piqa --output runs/eval [--limit 100] [-p]

A model is a checkpoint folder (its newest checkpoint), one `global_stepN` folder, an exported folder, which is measured by
lm-eval's own `hf` model, or OWNER/NAME of the Hub (megatron/evaluation/hub_models.py); `NAME=PATH` names it. With `-p` every
device has a process (`--processes` on a machine without any), and models share them; without it there is one. What has a result
file with the same settings is not run again. A job that fails leaves the others alone; its log says why.
`tools/collect_results.py` makes tables of the output folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Queue
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.errors import ConfigError, LaunchError, UserError, exit_on_error
from megatron.evaluation.hub_models import RELEASED_LENGTH, fetch, is_hub_name
from megatron.evaluation.options import GROUPS
from megatron.files import read_json, write_json


@dataclass(frozen=True)
class Model:
    """A name for files and tables, and what is measured; hub: its name on the Hub, until it has been fetched."""

    name: str
    path: Path
    hub: str | None = None


@dataclass(frozen=True)
class Job:
    """Tasks of one model for one process."""

    model: Model
    tasks: tuple[str, ...]


def named(words: Sequence[str]) -> list[Model]:
    """`NAME=PATH` or a path, whose name is its last parts; two models of one name are refused.

    What is no folder and can be OWNER/NAME is a model of the Hub.
    """
    found: list[Model] = []
    for word in words:
        name, _, path = word.rpartition("=")
        place = Path(path).absolute()
        if not place.is_dir() and is_hub_name(path):
            found.append(Model(name or path.replace("/", "-"), Path(path), hub=path))
            continue
        if not place.is_dir():
            raise ConfigError(
                f"there is no model folder {path}",
                hint="--model runs/NAME/checkpoints, an exported folder, or OWNER/NAME of the Hub",
            )
        parts = [part for part in place.parts[-3:] if part not in ("/", "runs", "checkpoints")]
        found.append(Model(name or "-".join(parts), place))
    names = [model.name for model in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two models are called '{twice[0]}'", hint="--model NAME=PATH")
    return found


def result_file(output: Path, model: Model, task: str) -> Path:
    """Where a result goes."""
    return output / model.name / f"{task}.json"


def is_done(file: Path, settings: Mapping[str, Any], place: Path) -> bool:
    """Whether this file is the result of this model with these settings."""
    try:
        kept = read_json(file)
    except (OSError, ValueError):
        return False
    return kept.get("settings") == dict(settings) and kept.get("place") == str(place)


def plan(models: Sequence[Model], tasks: Sequence[str], processes: int, skip: Mapping[tuple[str, str], bool]) -> list[Job]:
    """The jobs: each model's open tasks, dealt out so that no process idles while another has several tasks."""
    jobs = []
    shares = max(1, -(-processes // max(1, len(models))))
    for model in models:
        left = [task for task in tasks if not skip.get((model.name, task))]
        jobs += [Job(model, part) for i in range(shares) if (part := tuple(left[i::shares]))]
    return jobs


def devices(parallel: bool, processes: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each process; None leaves the variable alone (no accelerator, or one process)."""
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout if _has_smi() else ""
    found = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    found = found or [str(i) for i in range(len(listed.splitlines()))]
    if not parallel:
        return [None]
    return list(found) if found else [None] * processes


def _has_smi() -> bool:
    return any((Path(folder) / "nvidia-smi").is_file() for folder in os.environ.get("PATH", "").split(os.pathsep))


def run_job(job: Job, output: Path, settings: Mapping[str, Any], data_dir: str | None, device: str | None) -> bool:
    """One worker process; whether it did all of its tasks."""
    log = output / "logs" / f"{job.model.name}-{job.tasks[0]}-{len(job.tasks)}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    order: dict[str, Any] = {"name": job.model.name, "path": str(job.model.path), "tasks": job.tasks, "output": str(output)}
    order |= {"settings": dict(settings), "data_dir": data_dir, "imported": job.model.path.parent.name == "imported"}
    environment = dict(os.environ) | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
    started = time.monotonic()
    with open(log, "w", encoding="utf-8") as handle:
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(order)]
        done = subprocess.run(command, env=environment, stdout=handle, stderr=subprocess.STDOUT, check=False)
    word = "done" if done.returncode == 0 else f"FAILED ({done.returncode})"
    print(f"{word} in {time.monotonic() - started:.0f} s: {job.model.name}: {' '.join(job.tasks)}; log {log}", flush=True)
    return done.returncode == 0


def work(order: Mapping[str, Any]) -> None:
    """What a worker process does: load the model once, write one file per task."""
    from megatron.evaluation.models import ModelOptions, open_model, place_of
    from megatron.evaluation.options import Request
    from megatron.evaluation.run_lm_eval import measure, score_lines, summary

    settings, model = dict(order["settings"]), Model(order["name"], Path(order["path"]))
    limit, shots, context = (settings.pop(key) for key in ("limit", "num_fewshot", "context_length"))
    if order["imported"] and settings["max_length"] is None:
        print(f"the model says no length: {RELEASED_LENGTH} tokens are read at most (--max-length)", flush=True)
        settings["max_length"] = RELEASED_LENGTH
    lm, metadata = open_model(model.path, ModelOptions(**settings))
    facts = {"model": model.name, "place": str(place_of(model.path)), "settings": order["settings"], "context_length": context}
    failed: list[str] = []
    for task in order["tasks"]:
        folder = Path(order["data_dir"]) if order["data_dir"] else None
        asked = Request((task,), limit, shots, folder, {**metadata, "context_length": context})
        try:
            found = measure(lm, asked)
        except UserError as error:
            print(f"{task}: {error}", flush=True)
            failed.append(task)
            continue
        assert found is not None
        print("\n".join(score_lines(found)), flush=True)
        file = result_file(Path(order["output"]), model, task)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, summary(found, facts))
    if failed:
        raise LaunchError(f"not measured: {', '.join(failed)}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("-m", "--model", nargs="+", action="extend", default=[], metavar="[NAME=]PATH|OWNER/NAME")
    p.add_argument("-t", "--task", nargs="+", action="extend", default=[], help=f"tasks of lm-eval, or {', '.join(GROUPS)}")
    p.add_argument("--output", type=Path, default=Path("runs/eval"), help="folder of the result files")
    p.add_argument("--limit", type=int, help="examples per task")
    p.add_argument("-p", "--parallelize", action="store_true", help="one process per device")
    p.add_argument("--processes", type=int, default=2, help="of -p on a machine without accelerators")
    p.add_argument("--data-dir", help="local datasets under their hub names")
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--num-fewshot", type=int)
    p.add_argument("--max-length", type=int, help="tokens read at most; unset: as trained")
    p.add_argument("--context-length", type=int, default=1000, help="of the recall tasks: document and answer; 0 does not cut")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--prompt-mode", default="plain", choices=["plain", "left_pad", "read_twice"], help="prompts of JRT models")
    p.add_argument("--prefix-scope", default="context", choices=["context", "whole"], help="prefix of JRT models in scoring")
    p.add_argument("--no-eod-stop", action="store_true", help="generate past an end of document, as the released harnesses do")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    return p


def launch(a: argparse.Namespace) -> None:
    """Run what is not done yet."""
    from megatron.checkpoint.find import find_checkpoint

    models, tasks = named(a.model), list(dict.fromkeys(name for task in a.task for name in GROUPS.get(task, (task,))))
    if not models or not tasks:
        raise ConfigError("name at least one --model and one --task")
    models = [replace(m, path=fetch(m.hub, a.output.absolute()), hub=None) if m.hub else m for m in models]
    kept = ("limit", "num_fewshot", "context_length", "batch_size", "max_length", "dtype", "prompt_mode", "prefix_scope")
    settings = {key: getattr(a, key) for key in kept} | {"stop_at_eod": not a.no_eod_stop}
    places = {}
    for model in models:
        direct = any((model.path / name).is_file() for name in ("config.json", "manifest.json"))
        places[model.name] = model.path if direct else find_checkpoint(str(model.path)) or model.path
    done = {(m.name, t): is_done(result_file(a.output, m, t), settings, places[m.name]) for m in models for t in tasks}
    free: Queue[str | None] = Queue()
    slots = devices(a.parallelize, a.processes)
    for slot in slots:
        free.put(slot)
    jobs = plan(models, tasks, len(slots), done)
    print(f"{sum(done.values())} of {len(done)} results are there; {len(jobs)} jobs on {len(slots)} processes", flush=True)
    data_dir = str(Path(a.data_dir).absolute()) if a.data_dir else None

    def one(job: Job) -> bool:
        device = free.get()
        try:
            return run_job(job, a.output.absolute(), settings, data_dir, device)
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(slots)) as pool:
        good = list(pool.map(one, jobs))
    if not all(good):
        raise LaunchError(
            f"{good.count(False)} of {len(jobs)} jobs failed", where=str(a.output / "logs"), hint="start again to go on"
        )


if __name__ == "__main__":
    with exit_on_error():
        arguments = parser().parse_args()
        if arguments.worker:
            work(json.loads(arguments.worker))
        else:
            launch(arguments)
