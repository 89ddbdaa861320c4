"""Stop after every step and resume: losses, gradient norms, weights, optimizer, random states and sample ids bitwise identical.

    python -m tests.faults.checkpoint_resume --steps 50 --mixers all [--output result.json]

The uninterrupted run saves after every step. Then, for every step k, an engine with another seed resumes from it and goes on:
at k its whole state must have the digest of the uninterrupted run, and so must each following step (`--follow`, all by
default).
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from megatron.checkpoint.save import save_checkpoint
from megatron.registry import layer_names
from tests.faults.checkpoint_run import Run, model_of
from tests.faults.report import as_typed, store

Step = tuple[str, str, list[int], str]


def advance(run: Run) -> Step:
    """One step and all that can be said about it."""
    loss, norm = run.step()
    return loss, norm, list(run.ids), run.digest()


def stop_everywhere(
    mixer: str, steps: int, follow: int, folder: Path, only: tuple[int, ...] = ()
) -> tuple[int, int, list[str]]:
    """(resumes, steps compared, what differed) for one mixer."""
    config = model_of(2, mixer)
    whole, record = Run("single", config), list[Step]()
    for _ in range(steps):
        record.append(advance(whole))
        save_checkpoint(folder, whole.engine, whole.state, **whole.options)
    other, wrong, compared = Run("single", config, seed=99), list[str](), 0
    stops = only or tuple(range(1, steps))
    for k in stops:
        random.seed(k)
        np.random.seed(k)
        torch.manual_seed(k)
        other.resume(folder, iteration=k)
        if other.digest() != record[k - 1][3] or other.iteration != k:
            wrong.append(f"{mixer}: the state of step {k} differs after the resume")
        for step in range(k, min(steps, k + follow)):
            compared += 1
            if advance(other) != record[step]:
                wrong.append(f"{mixer}: step {step + 1} after a resume at {k} differs")
                break
    return len(stops), compared, wrong


def main() -> None:
    """Run all, print; exit code 1 when anything differed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--follow", type=int, default=1000, help="steps compared after each resume")
    parser.add_argument("--mixers", nargs="+", default=["metala"])
    parser.add_argument("--output", type=Path, help="JSON to put the count into")
    args = parser.parse_args()
    torch.set_num_threads(1)
    mixers = list(layer_names()) if args.mixers == ["all"] else args.mixers
    result, begin = dict[str, object](), time.monotonic()
    bad: list[str] = []
    for mixer in mixers:
        memory = Path("/dev/shm")
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
            count, compared, wrong = stop_everywhere(mixer, args.steps, args.follow, Path(folder))
        result[mixer] = {"resumes": count, "steps compared": compared, "differ": len(wrong)}
        bad += wrong
        print(mixer, json.dumps(result[mixer]), flush=True)
    found = {**result, "minutes": round((time.monotonic() - begin) / 60, 1), "details": bad[:5]}
    print(json.dumps(found, indent=1))
    store(args.output, f"resume after every step of {args.steps}", as_typed(__file__), found)
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
