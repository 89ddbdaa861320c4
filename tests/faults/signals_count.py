"""Signals at random moments of a run on real ranks: every rank must leave at the same step, saved, with exit code 75.

    nice -n 15 .venv/bin/python -m tests.faults.signals_count --trials 100

A trial starts two ranks (pipeline, tensor or data parallel in turn) that train with slow data, validations and saves, sends
SIGTERM, SIGUSR1 or SIGINT to one of them or to both at a random moment, and then resumes: the next losses must be those of the
uninterrupted run, bit for bit. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.faults import ranks_pool
from tests.faults.report import store

MESHES = ({"pp": 2}, {"tp": 2}, {"zero_stage": 1})
STEPS = 60


def slow(mesh: Any, start: int) -> Iterator[Any]:
    """The tiny run's data; every seventh sample number waits a little, some ranks longer than others."""
    from tests.training.runs import MICRO_TOTAL, micros

    for number, batch in enumerate(micros(mesh, start)):
        if (start // MICRO_TOTAL + number) % 7 == 3:
            time.sleep(0.03 + 0.1 * mesh.rank)
        yield batch


def job(folder: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """One rank: train until told to leave, or `spec["until"]` steps."""
    from megatron.reliability.consensus import Consensus
    from megatron.reliability.signals import DEFAULT_SIGNALS, StopSignals, signal_numbers
    from megatron.reliability.stop import Control
    from megatron.training.intervals import SaveRule
    from tests.training.runs import make_engine, micros, options, train

    signals = StopSignals(signal_numbers(DEFAULT_SIGNALS)).start()
    engine = make_engine(kind="deepspeed", **spec["mesh"])
    phases: list[str] = []

    class Watched(Control):
        def phase(self, name: str, step: int | None = None) -> None:
            super().phase(name, step)
            if not signals.received:
                phases[:] = [name]

    control = Watched(Consensus.of_all_ranks(), signals, poll_s=0.05)
    rule = SaveRule(factor=5, train_iters=STEPS)
    asked = options(STEPS, save_rule=rule, eval_interval=4, exit_interval=spec.get("until"))
    ranks_pool.ready(folder)
    save = Path(spec["save"]) if "save" in spec else None
    data = slow if spec.get("slow") else micros
    run, recorder = train(engine, save, asked, resume=spec.get("resume", False), control=control, data=data)
    control.close()
    return {
        "code": run.exit_code,
        "iteration": run.state.iteration,
        "stop": run.stop,
        "phase": phases[0] if phases else "",
        "losses": {str(s.iteration): s.loss for s in recorder.steps},
    }


def one(root: Path, number: int, rng: random.Random, unbroken: dict[str, float]) -> dict[str, Any]:
    """One trial; `wrong` is empty when all went well."""
    from megatron.checkpoint.layout import whole_steps

    mesh = MESHES[number % len(MESHES)]
    kind = rng.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
    target = rng.choice([0, 1, None])
    save = root / f"save{number}"
    trial = ranks_pool.start(job, 2, root / f"trial{number}", {"mesh": mesh, "save": str(save), "slow": True})
    trial.started()
    time.sleep(rng.uniform(0.0, 2.5))
    for rank in (0, 1) if target is None else (target,):
        trial.send(rank, kind)
    begin = time.monotonic()
    codes = trial.wait(60)
    seconds = time.monotonic() - begin
    results = [trial.result(rank) for rank in (0, 1)]
    wrong = "" if set(codes.values()) == {75} else f"exit codes {codes}"
    if not wrong:
        step = results[0]["iteration"]
        wrong = "" if step == results[1]["iteration"] else "the ranks left at different steps"
        if not wrong and step and max(whole_steps(save), default=None) != step:
            wrong = f"step {step} is not saved: {sorted(whole_steps(save))}"
        if not wrong and step < STEPS - 2:
            wrong = _resumed(root / f"resume{number}", mesh, save, step, unbroken)
    if wrong:
        print("\n".join(trial.log(rank)[-3000:] for rank in (0, 1)), file=sys.stderr)
    shutil.rmtree(save, ignore_errors=True)
    hit = results[0 if target is None else target].get("phase", "")
    return {"wrong": wrong, "phase": hit, "seconds": seconds, "signal": kind.name}


def _resumed(folder: Path, mesh: dict[str, int], save: Path, step: int, unbroken: dict[str, float]) -> str:
    spec = {"mesh": mesh, "save": str(save), "resume": True, "until": step + 2 if step else 2}
    again = ranks_pool.start(job, 2, folder, spec)
    codes = again.wait(60)
    losses = again.result(0).get("losses", {})
    want = {n: loss for n, loss in unbroken.items() if n in losses}
    if set(codes.values()) != {0} or not losses or losses != want:
        return f"resumed from {step}: exit codes {codes}, losses {losses} instead of {want}"
    return ""


def main(argv: list[str]) -> int:
    """Run the trials, print the count; 1 if any went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON to put the count into")
    asked = parser.parse_args(argv)
    ranks_pool.preload()
    rng, begin = random.Random(asked.seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="signals") as name:
        root, unbroken = Path(name), []
        for i, mesh in enumerate(MESHES[: asked.trials]):
            whole = ranks_pool.start(job, 2, root / f"whole{i}", {"mesh": mesh})
            assert set(whole.wait(60).values()) == {0}, whole.log(0)
            unbroken.append(whole.result(0)["losses"])
        trials = [one(root, i, rng, unbroken[i % len(MESHES)]) for i in range(asked.trials)]
    good = sum(not t["wrong"] for t in trials)
    report = {
        "trials": len(trials),
        "agreed saves with code 75": good,
        "phases": dict(Counter(t["phase"] for t in trials)),
        "signals": dict(Counter(t["signal"] for t in trials)),
        "slowest_exit_s": round(max(t["seconds"] for t in trials), 2),
        "wrong": [t["wrong"] for t in trials if t["wrong"]],
        "seconds": round(time.monotonic() - begin, 1),
    }
    print(json.dumps(report))
    store(asked.output, "signals", f"python -m tests.faults.signals_count --trials {asked.trials}", report)
    return int(good != len(trials))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
