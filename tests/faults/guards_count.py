"""Bad numbers on every engine, mesh and precision: every fault must be skipped on all ranks with all state unchanged.

    python -m tests.faults.guards_count --each 12

Prints one JSON line; `test_guards.py` runs the same cases with fewer faults.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megatron.engine.schedule import learning_rate
from tests.faults.guards_job import guarded_run
from tests.faults.report import store
from tests.parallel.ranks import run_ranks
from tests.training.runs import CURVE

# engine kind, world, mesh and precision
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "single-fp32": ("single", 1, {}),
    "single-bf16": ("single", 1, {"dtype": "bf16"}),
    "pp2-fp32": ("deepspeed", 2, {"pp": 2}),
    "tp2-bf16": ("deepspeed", 2, {"tp": 2, "dtype": "bf16"}),
    "dp2-zero1-fp32": ("deepspeed", 2, {"zero_stage": 1}),
    "dp2-zero2-bf16": ("deepspeed", 2, {"zero_stage": 2, "dtype": "bf16"}),
    "dp2-zero3-fp32": ("deepspeed", 2, {"zero_stage": 3}),
    "dp2-bf16-sums": ("deepspeed", 2, {"dtype": "bf16", "fp32_grad_accum": False}),
    "pp2tp2-bf16": ("deepspeed", 4, {"pp": 2, "tp": 2, "dtype": "bf16"}),
}


def check(name: str, count: int, seed: int) -> int:
    """Run a case; the number of faults that were skipped as they should be."""
    kind, world, mesh = CASES[name]
    results = run_ranks(guarded_run, world, kind, count, seed, mesh, connect=world > 1, timeout=240)
    for got in results:
        planned = sorted(results[0]["todo"])
        assert got["skipped"] == planned, (name, got["reasons"], planned)
        for step, unchanged in got["unchanged"].items():
            assert unchanged == (step in planned), (name, step)
        assert got["rates"] == [learning_rate(n, CURVE) for n in _applied_before(len(got["rates"]), planned)]
        assert got["applied"] == len(got["rates"]) - count
        for step in planned:
            ids = sorted(i for own in got["samples"][step] for i in own)
            assert ids == list(range(8 * (step - 1), 8 * step)), "the samples of all ranks are named"
            assert len(got["samples"][step]) == (2 if name.startswith("dp2") else 1)
    return len(results[0]["skipped"])


def _applied_before(steps: int, skipped: list[int]) -> list[int]:
    return [step - 1 - sum(s < step for s in skipped) for step in range(1, steps + 1)]


def main(argv: list[str]) -> int:
    """Run all cases, print the count; an assertion fails where one fault was not held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=12, help="faults per case")
    parser.add_argument("--output", type=Path, help="JSON to put the count into")
    asked = parser.parse_args(argv)
    counts = {name: check(name, asked.each, seed=11) for name in CASES}
    report = {"faults": sum(counts.values()), "skipped on all ranks, state unchanged": counts}
    print(json.dumps(report))
    store(asked.output, "guards", f"python -m tests.faults.guards_count --each {asked.each}", report)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
