"""Does a run grow? Resident memory of a tiny training, from step 250 to step 2,500.

    nice -n 10 .venv/bin/python -m tests.faults.memory_growth [--from-step 250 --to-step 2500] [--set KEY=VALUE ...]

Starts `train.py` on a corpus of its own in a folder of its own, with a log line, a validation and a save as often as a real run
has them, and reads /proc: anonymous memory (heap and arenas; pages of mapped files are the kernel's to drop). The figure at a
step is the mean of the samples over the 50 steps before it. Exit code 1 when the growth is above the limit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from megatron.data.indexed_writer import IndexedWriter
from megatron.observe.jsonl import read_rows
from tests.faults.report import store

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 0.01
_WIDTH = 50  # steps a figure is the mean of
CONFIG = {
    "tokenizer_type": "CharLevelTokenizer",
    "split": "90, 10, 0",
    "data_impl": "mmap",
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "seq_length": 64,
    "attention_config": [[["metala"], 2]],
    "norm": "simplermsnorm",
    "pos_emb": "none",
    "mlp_type": "llama",
    "activation": "silu",
    "intermediate_size": 64,
    "precision": "fp32",
    "optimizer": {"type": "Adam", "params": {"lr": 1.0e-3, "betas": [0.9, 0.95], "eps": 1.0e-8}},
    "lr_decay_style": "cosine",
    "train_micro_batch_size_per_gpu": 4,
    "log_interval": 10,
    "eval_interval": 100,
    "eval_iters": 2,
    "checkpoint_factor": 100,
    "keep_last_n_checkpoints": 2,
}


def anonymous_kib(pid: int) -> int | None:
    """Anonymous resident memory of a process in KiB; None when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), None)


def sample(folder: Path, steps: int, overrides: list[str]) -> list[tuple[int, int]]:
    """(step, KiB) through a run of `steps` steps.

    Raises:
        RuntimeError: the run failed.
    """
    config = folder / "grow.yml"
    rng = np.random.default_rng(1)
    with IndexedWriter(folder / "corpus", "uint16") as writer:
        for length in rng.integers(16, 400, 4000):
            writer.add_document(rng.integers(0, 256, length))
    paths = {"run_dir": str(folder / "run"), "save": str(folder / "run/checkpoints"), "data_path": str(folder / "corpus")}
    config.write_text(json.dumps({**CONFIG, **paths, "train_iters": steps}), encoding="utf-8")
    more = [word for item in overrides for word in ("--set", item)]
    command = [sys.executable, "train.py", str(config), *more]
    points: list[tuple[int, int]] = []
    with open(folder / "log", "wb") as log, subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log) as child:
        while child.poll() is None:
            time.sleep(0.2)
            rows, used = read_rows(folder / "run/metrics.jsonl"), anonymous_kib(child.pid)
            if rows and used and (not points or points[-1][0] < rows[-1]["iteration"]):
                points.append((rows[-1]["iteration"], used))
    if child.returncode:
        raise RuntimeError((folder / "log").read_text(errors="replace")[-2000:])
    return points


def mean_at(points: list[tuple[int, int]], step: int) -> float:
    """Mean KiB over the samples of the steps before `step`."""
    near = [used for at, used in points if step - _WIDTH <= at <= step]
    if not near:
        raise RuntimeError(f"no sample near step {step}")
    return sum(near) / len(near)


def main() -> None:
    """Run, print one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--from-step", type=int, default=250)
    parser.add_argument("--to-step", type=int, default=2500)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--curve", action="store_true", help="also print the figure every 250 steps")
    parser.add_argument("--output", type=Path, help="JSON to put the result into")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        points = sample(Path(folder), args.to_step, args.overrides)
    first, last = mean_at(points, args.from_step), mean_at(points, args.to_step)
    found = {"steps": [args.from_step, args.to_step], "mib": [first / 1024, last / 1024], "growth": last / first - 1}
    if args.curve:
        every = range(args.from_step, args.to_step + 1, 250)
        found["curve_mib"] = [round(mean_at(points, step) / 1024, 2) for step in every]
    print(json.dumps(found))
    command = " ".join(["python", "-m", "tests.faults.memory_growth", *sys.argv[1:]])
    store(args.output, "memory growth", command, found)
    raise SystemExit(last / first - 1 > LIMIT)


if __name__ == "__main__":
    main()
