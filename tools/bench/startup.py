"""How long a run takes from the command to its first step, by launcher and number of processes, and where the time goes.

    python tools/bench/startup.py [--worlds 1 2 4] [--routes python deepspeed torchrun ...] [--output FILE]

Each cell is one start of a tiny run of three steps on this machine, data parallel. The parts are read off one timeline of
rank 0: the command starts; its rank's interpreter starts (launcher), its last import is done (imports), the process group is
there (rendezvous), the engine is built (engine), the first step is finished (first step), the command has ended (end).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.files import write_json
from tests.launch.lab import ROOT, OneNodeSlurm, clean_environment, missing
from tests.launch.tiny_run import write_run
from tests.parallel.rank_server import free_port

PARTS = ("launcher", "imports", "rendezvous", "engine", "first step", "end")
# Runs in each rank instead of train.py: train.py with a clock at the boundaries of its parts.
_CLOCKED = """
import os, sys, time
born = time.time()
sys.path.insert(0, {root!r})
import train
import megatron.assemble as assemble
marks = {{"born": born, "imported": time.time()}}
def after(module, name, mark):
    inner = getattr(module, name)
    def timed(*args, **kwargs):
        result = inner(*args, **kwargs)
        marks.setdefault(mark, time.time())
        return result
    setattr(module, name, timed)
after(assemble, "init_process_group", "connected")
after(assemble, "build_engine", "built")
from megatron.training.reporting import Reporting
after(Reporting, "on_step", "stepped")
code = train.main(sys.argv[1:])
if os.environ.get("RANK", "0") == "0":
    import json
    open({marks!r}, "w").write(json.dumps(marks))
sys.exit(code)
"""


def routes(script: str, config: str, world: int) -> dict[str, Callable[[], list[str]]]:
    """Name -> the command that starts `world` processes."""
    more = [config, "--set", f"num_gpus={world}", "--set", f"master_port={free_port()}"]
    deepy = [sys.executable, "deepy.py", script, *more]
    return {
        "python": lambda: [sys.executable, script, *more],
        "deepspeed": lambda: deepy,
        "torchrun": lambda: [*deepy, "--set", "launcher=torchrun"],
        "mpirun": lambda: [
            *("mpirun", "-n", str(world), "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"),
            *(sys.executable, script, *more),
        ],
        "srun": lambda: ["srun", "-n", str(world), sys.executable, script, *more],
        "slurm": lambda: [*deepy, "--set", "launcher=slurm"],
    }


def measure(route: str, world: int, folder: Path, env: dict[str, str]) -> dict[str, Any]:
    """One start, in seconds by part."""
    run = Path(tempfile.mkdtemp(dir=folder))
    script, marks = run / "clocked.py", run / "marks.json"
    script.write_text(_CLOCKED.format(root=str(ROOT), marks=str(marks)))
    config = write_run(run, train_iters=3, train_batch_size=8, run_dir=str(run / "run"))
    command = routes(str(script), str(config), world)[route]()
    begin = time.time()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=120)
    end = time.time()
    if done.returncode:
        raise RuntimeError(f"{route} {world}: {done.stderr[-2000:]}")
    m = json.loads(marks.read_text())
    times = [begin, m["born"], m["imported"], m["connected"], m["built"], m["stepped"], end]
    row: dict[str, Any] = {"route": route, "processes": world, "total": round(end - begin, 2)}
    return row | {part: round(times[i + 1] - times[i], 2) for i, part in enumerate(PARTS)}


def main() -> int:
    """Measure every route; the table goes to the console and into the file."""
    parser = argparse.ArgumentParser(description="Start-up times by launcher.")
    parser.add_argument("--worlds", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--routes", nargs="*", default=["python", "deepspeed", "torchrun", "mpirun", "srun", "slurm"])
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lnx-startup-", dir="/tmp"))
    slurm = None
    rows = []
    try:
        print(f"{'route':10} {'n':>2} {'total':>6}  " + "  ".join(f"{p:>10}" for p in PARTS))
        for route in arguments.routes:
            needs = {"mpirun": ("mpirun",), "srun": ("slurmctld", "munged"), "slurm": ("slurmctld", "munged")}.get(route, ())
            if needs and (why := missing("ip", *needs)):
                print(f"{route:10} skipped: {why}")
                continue
            if route in ("srun", "slurm") and slurm is None:
                slurm = OneNodeSlurm(folder / "slurm")
            env = slurm.environment() if slurm and route in ("srun", "slurm") else clean_environment()
            env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
            for world in arguments.worlds if route != "python" else [1]:
                row = measure(route, world, folder, env)
                rows.append(row)
                print(f"{route:10} {world:2} {row['total']:6.1f}  " + "  ".join(f"{row[p]:10.2f}" for p in PARTS), flush=True)
    finally:
        if slurm:
            slurm.close()
        shutil.rmtree(folder, ignore_errors=True)
    if arguments.output:
        write_json(arguments.output, {"machine": platform.machine(), "cores": os.cpu_count(), "seconds": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
