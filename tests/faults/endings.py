"""Do finished runs of two processes end with 0? Fresh ones, and ones that resume right after their launcher was killed.

    nice -n 10 .venv/bin/python -m tests.faults.endings --count 50

Every trial is a real command: `deepy.py train.py` or `torchrun train.py` on a tiny model, two ranks. A resumed trial first
starts the command, kills its launcher (SIGKILL) once a checkpoint is whole, starts the same command again at once, and wants
that one to finish. Prints a line for each trial and one JSON line at the end; the exit code is 1 when a trial went wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.faults.report import store
from tests.tiny_run import write_run

ROOT = Path(__file__).parents[2]
KINDS = ("deepy fresh", "deepy resumed", "torchrun fresh", "torchrun resumed")
STEPS = 3
LIMIT_S = 180.0
_TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py")


@dataclass(frozen=True)
class Ending:
    """How one trial ended.

    code: of the command that should finish. ranks_outlived_s: how long ranks of the killed launcher went on, at most 10.
    """

    kind: str
    code: int
    words: str
    ranks_outlived_s: float = 0.0


def _command(kind: str, config: Path, steps: int) -> list[str]:
    start = ("deepy.py", "train.py") if kind.startswith("deepy") else _TORCHRUN
    more = ("--set", "num_gpus=2") if kind.startswith("deepy") else ()
    return [sys.executable, *start, str(config), *more, "--set", f"train_iters={steps}"]


def _start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    known = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    with open(log, "ab") as out:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**known, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def ranks_of(config: Path, *words: bytes) -> list[int]:
    """Process ids of the ranks that train `config`, those without a launcher too; words: of their command lines."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().split(b"\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        named = b"train.py" in line[:4] and {str(config).encode(), *words} <= set(line) and b"deepy.py" not in line[:3]
        if named and state not in "ZX" and not any(b"supervisor" in word or b"torch.distributed" in word for word in line):
            found.append(int(folder.name))
    return found


def _kill_launcher(kind: str, config: Path, log: Path) -> float:
    """Start, wait for the first whole checkpoint, kill the launcher; the moment of that."""
    first = _start(_command(kind, config, 100_000), log)
    deadline = time.monotonic() + LIMIT_S
    while not (config.parent / "save" / "latest").is_file():
        assert first.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    return time.monotonic()


def one(kind: str, folder: Path) -> Ending:
    """One trial."""
    config = write_run(
        folder,
        zero_optimization={"stage": 1},
        train_batch_size=4,
        lr_decay_iters=1000,
        num_layers=1,
        attention_config=[[["metala"], 1]],
        log_interval=100_000,  # no metrics, so that no plot is drawn at the end
        checkpoint_factor=1 if kind.endswith("resumed") else 100_000,
        keep_last_n_checkpoints=2,
        run_dir=str(folder / "run"),
        save=str(folder / "save"),
        load=str(folder / "save"),
    )
    log, killed, steps = folder / "log.txt", 0.0, STEPS
    if kind.endswith("resumed"):
        killed = _kill_launcher(kind, config, log)
        steps += int("".join(filter(str.isdigit, (folder / "save" / "latest").read_text())))
    last = _start(_command(kind, config, steps), log)
    outlived = 0.0
    while killed and time.monotonic() - killed < 10 and ranks_of(config, b"train_iters=100000"):
        outlived = time.monotonic() - killed
        time.sleep(0.05)
    try:
        code = last.wait(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        code = -1
        os.killpg(last.pid, signal.SIGKILL)
        last.wait()
    for pid in ranks_of(config):  # of a launcher that did not end them
        os.kill(pid, signal.SIGKILL)
    words = "" if code == 0 else log.read_text(errors="replace")[-3000:]
    print(f"{kind}: {code}, ranks of the killed launcher went on for {outlived:.2f} s", file=sys.stderr, flush=True)
    return Ending(kind, code, words, outlived)


def main(argv: list[str]) -> int:
    """Run the trials, print the count; 1 if any did not end with 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50, help="trials of each kind")
    parser.add_argument("--kinds", default=",".join(KINDS), help="some of these")
    parser.add_argument("--at-once", type=int, default=2, help="trials that run beside each other")
    parser.add_argument("--output", type=Path, help="JSON to put the count into")
    asked = parser.parse_args(argv)
    kinds = [kind for _ in range(asked.count) for kind in asked.kinds.split(",")]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="endings") as name, ThreadPoolExecutor(asked.at_once) as pool:
        endings = list(pool.map(lambda i: one(kinds[i], Path(name) / str(i)), range(len(kinds))))
    report = {
        "trials": len(endings),
        "ended with 0": sum(ending.code == 0 for ending in endings),
        "codes": {k: dict(Counter(str(e.code) for e in endings if e.kind == k)) for k in asked.kinds.split(",")},
        "slowest end of the ranks of a killed launcher, s": round(max(e.ranks_outlived_s for e in endings), 2),
        "wrong": [f"{e.kind}: {e.code}\n{e.words}" for e in endings if e.code],
        "seconds": round(time.monotonic() - begin, 1),
    }
    print(json.dumps(report))
    store(asked.output, "endings", f"python -m tests.faults.endings --count {asked.count}", report)
    return int(report["ended with 0"] != len(endings))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
