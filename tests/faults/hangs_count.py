"""Ranks that stop, loop, die or fail: the others must name the rank, its phase and its stack, and leave in time.

    nice -n 15 .venv/bin/python -m tests.faults.hangs_count --trials 20

Three real ranks train; at a random moment one of them is stopped (SIGSTOP), killed (SIGKILL), sent into an endless loop in its
training thread or in its data, or meets an error in its data. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.faults import ranks_pool
from tests.faults.report import store

TIMEOUT_S = 2.5
WORLD = 3
FAULTS = ("stop", "kill", "loop", "data loop", "data error")
CODES = {"stop": {22}, "kill": {22}, "loop": {21}, "data loop": {21}, "data error": {22}}


def spin_for_ever() -> None:
    """An endless loop with a name that a stack can show."""
    while True:
        time.sleep(0.01)


def job(folder: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """One rank; the victim's fault comes at its step."""
    from megatron.errors import DataError
    from megatron.reliability.consensus import Consensus
    from megatron.reliability.stop import Control
    from megatron.reliability.watchdog import Watchdog
    from megatron.training.hooks import Hook, Run, Step
    from tests.training.runs import make_engine, micros, options, train

    engine = make_engine(kind="deepspeed", **spec["mesh"])
    mine = engine.mesh.rank == spec["victim"]
    ballot = Consensus.of_all_ranks()
    control = Control(ballot, watchdog=Watchdog.open(TIMEOUT_S, engine.mesh.rank, ballot), poll_s=0.1)

    class Fault(Hook):
        def on_step(self, run: Run, step: Step) -> None:
            time.sleep(0.02)
            if step.iteration == 3:
                ranks_pool.ready(folder)
            if mine and spec["fault"] == "loop" and step.iteration == spec["step"]:
                spin_for_ever()

    def data(mesh: Any, start: int) -> Iterator[Any]:
        for number, batch in enumerate(micros(mesh, start)):
            if mine and number == 2 * spec["step"] and spec["fault"] == "data loop":
                spin_for_ever()
            if mine and number == 2 * spec["step"] and spec["fault"] == "data error":
                raise DataError("sample 77 is damaged")
            yield batch

    train(engine, None, options(100_000), hooks=[Fault()], control=control, data=data)
    return {}


def one(folder: Path, fault: str, rng: random.Random) -> dict[str, Any]:
    """One trial; `wrong` is empty when all went well."""
    victim, step = rng.randrange(WORLD), rng.randrange(4, 12)
    mesh = {"zero_stage": 1}
    trial = ranks_pool.start(job, WORLD, folder, {"mesh": mesh, "fault": fault, "victim": victim, "step": step})
    trial.started()
    time.sleep(0.1 * step)
    if fault in ("stop", "kill"):
        trial.send(victim, signal.SIGSTOP if fault == "stop" else signal.SIGKILL)
    begin = time.monotonic()
    others = [rank for rank in range(WORLD) if rank != victim]
    codes: dict[int, int] = {}
    while len(codes) < len(others) and time.monotonic() - begin < 10 * TIMEOUT_S:
        for rank in others:
            done, status = os.waitpid(trial.pids[rank], os.WNOHANG) if rank not in codes else (0, 0)
            if done:
                codes[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    seconds = time.monotonic() - begin
    for rank in codes:
        trial.pids.pop(rank)
    ends = trial.wait(0.0 if fault == "stop" else 5.0)
    return {"fault": fault, "seconds": seconds, "wrong": _wrong(trial, fault, victim, codes, ends, seconds)}


def _wrong(
    trial: ranks_pool.Trial, fault: str, victim: int, codes: dict[int, int], ends: dict[int, int | None], seconds: float
) -> str:
    if len(codes) < WORLD - 1 or not set(codes.values()) <= CODES[fault]:
        return f"{fault}: the others ended with {codes}\n" + "\n".join(trial.log(rank) for rank in range(WORLD))
    if fault in ("loop", "data loop") and ends[victim] != 21:
        return f"{fault}: the victim ended with {ends[victim]}"
    # A loop begins up to 12 slow steps after the clock; the others wait for it from then on.
    if seconds > 2 * TIMEOUT_S + (1.5 if "loop" in fault or "error" in fault else 0.0):
        return f"{fault}: it took {seconds:.1f} s"
    for rank in codes:
        said = trial.log(rank)
        if f"rank {victim} (" not in said or "phase '" not in said:
            return f"{fault}: rank {rank} does not name rank {victim}:\n{said}"
        stack = {"loop": "spin_for_ever", "data loop": "spin_for_ever", "data error": "sample 77 is damaged"}.get(fault, ".py:")
        if stack not in said:
            return f"{fault}: rank {rank} shows no stack:\n{said}"
    return ""


def main(argv: list[str]) -> int:
    """Run the trials, print the count; 1 if any went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", default=",".join(FAULTS), help="some of these, taken in turn")
    parser.add_argument("--output", type=Path, help="JSON to put the count into")
    asked = parser.parse_args(argv)
    faults = asked.faults.split(",")
    ranks_pool.preload()
    rng = random.Random(asked.seed)
    with tempfile.TemporaryDirectory(prefix="hangs") as name:
        trials = [one(Path(name) / str(i), faults[i % len(faults)], rng) for i in range(asked.trials)]
    slowest = {fault: max((t["seconds"] for t in trials if t["fault"] == fault), default=0.0) for fault in FAULTS}
    good = sum(not t["wrong"] for t in trials)
    report = {
        "trials": len(trials),
        "named and left in time": good,
        "hang_timeout_s": TIMEOUT_S,
        "slowest_s": {fault: round(seconds, 2) for fault, seconds in slowest.items()},
        "wrong": [t["wrong"] for t in trials if t["wrong"]],
    }
    print(json.dumps(report))
    store(asked.output, "hangs", f"python -m tests.faults.hangs_count --trials {asked.trials}", report)
    return int(good != len(trials))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
