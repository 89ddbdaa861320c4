"""Train many small models on a synthetic task and keep what each of them recalls.

    python tools/synthetics.py configs/synthetics/mqar-cpu.yml [--workers 2] [--output results.jsonl] [--list]

The YAML names the data (a task and its slices), and families of models with grids over widths, feature sizes, windows and
learning rates (docs/synthetics.md). Each worker is a process with one thread. A finished point is not run again, so the same
command goes on where a killed one stopped; a rate is left out when another one has solved the task for the same model. The same
command can be started several times at once. `tools/figures_recall.py` draws the results.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from megatron.config.problems import Problems
from megatron.config.yaml_reader import read_files
from megatron.errors import ConfigError, TrainingError, exit_on_error
from megatron.synthetics.sweep import describe, group, points_of, solved, work
from megatron.synthetics.sweep_results import Results
from megatron.synthetics.train_point import Point


def read_sweep(path: Path) -> list[Point]:
    """The points of a YAML.

    Raises:
        ConfigError: it cannot be read or describes no sweep.
    """
    problems = Problems()
    source = read_files([path], None, problems)
    problems.raise_if_any()
    try:
        return points_of(source.values)
    except ConfigError as error:
        error.where = f"{path}: {error.where}" if error.where else str(path)
        raise


def _work(points: list[Point], path: Path, parent: int) -> None:
    """One worker; it stops when its parent is gone."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    work(points, Results(path), lambda text: print(text, flush=True), lambda: os.getppid() == parent)


def run(args: argparse.Namespace) -> None:
    """Run the sweep, or list what is left of it."""
    points = read_sweep(args.sweep)
    path = args.output or Path("runs") / "synthetics" / f"{args.sweep.stem}.jsonl"
    results, started = Results(path), time.monotonic()
    known = results.read()
    print(f"{len(points)} points, {sum(p.key() in known for p in points)} finished in {path}", flush=True)
    if args.list:
        for point in points:
            line = known.get(point.key())
            print(f"{describe(point)}: {'open' if line is None else format(line['accuracy'], '.3f')}")
        return
    context = multiprocessing.get_context("fork")  # torch is imported once
    workers = [context.Process(target=_work, args=(points, path, os.getpid()), daemon=True) for _ in range(args.workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    known = results.read()
    left_out = solved(points, known)
    print(f"{sum(p.key() in known for p in points)} of {len(points)} points finished, {len(left_out)} models solved the task, "
          f"{time.monotonic() - started:.0f} s")  # fmt: skip
    if all(p.key() in known or group(p) in left_out for p in points):
        results.finish()
    failed = [worker.exitcode for worker in workers if worker.exitcode]
    if failed:
        raise TrainingError(f"{len(failed)} of {args.workers} workers failed", hint="their messages stand above")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, one thread each")
    parser.add_argument("--output", type=Path, default=None, help="JSON lines; default runs/synthetics/NAME.jsonl")
    parser.add_argument("--list", action="store_true", help="say which points are open and stop")
    with exit_on_error():
        args = parser.parse_args()
        run(args)


if __name__ == "__main__":
    main()
