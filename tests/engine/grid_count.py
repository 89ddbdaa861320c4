"""The whole equality grid on real ranks: how many cells equal one process, and the largest differences.

    python -m tests.engine.grid_count --part grid [--output benchmarks/results/mesh-grid.json]

Parts: grid (every mixer x mesh x ZeRO 0, 1 x recomputation x tied), sharded (ZeRO 2, 3 on the meshes without a pipeline),
sequence (sequence parallelism on the meshes with tensor ranks), bf16; masked, packed and jrt are the grid again with uneven
masks, documents in a row, and the compound objective; context is the grid of context parallelism (`context_cases.py`),
context-bf16 the same mixers and meshes in bf16. A part takes some minutes; the JSON keeps the others.
Exit code 1 when a cell is outside the tolerances of `grid_cases.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.engine import context_cases
from tests.engine.grid_cases import (
    BATCHES,
    FORMS,
    LOSS,
    LOSS_BF16,
    MESHES,
    NORM,
    WEIGHT,
    Difference,
    Form,
    Mesh3,
    mixers,
    possible,
    run_cells,
)

CONTEXT = {"context": context_cases.whole_grid, "context-bf16": context_cases.bf16_cells}
LIMITS: dict[str, tuple[float, float | None, float | None]] = {
    "bf16": (LOSS_BF16, None, None),
    "context": (context_cases.LIMIT,) * 3,
    "context-bf16": (LOSS_BF16, None, None),
}


def forms_of(part: str) -> list[Form]:
    """What a part varies for each mixer and mesh."""
    if part == "grid":
        return FORMS
    if part == "sharded":
        return [replace(form, zero_stage=form.zero_stage + 2) for form in FORMS]
    if part in BATCHES:
        return [replace(form, batch=part) for form in FORMS]
    if part == "sequence":
        return [replace(form, sequence=True) for form in FORMS]
    return [Form(dtype="bf16"), Form(zero_stage=3, dtype="bf16"), Form(dtype="bf16", sequence=True)]


def main() -> int:
    """Run a part, print and store its count."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=("grid", "sharded", "sequence", "bf16", *BATCHES[1:], *CONTEXT), required=True)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    limits = LIMITS.get(args.part, (LOSS, NORM, WEIGHT))
    begin, all_found, outside = time.monotonic(), list[Difference](), list[str]()
    meshes, names = (context_cases.MESHES, context_cases.names()) if args.part in CONTEXT else (MESHES, mixers())
    for mesh in meshes:
        for mixer in names:
            found = _cells(args.part, mesh, mixer)
            all_found += [f for f in found.values() if isinstance(f, Difference)]
            outside += [f"{mixer} {mesh} {form}: {f}" for form, f in found.items() if not _fits(f, limits)]
        print(f"{mesh}: {len(all_found)} cells, {len(outside)} outside, {time.monotonic() - begin:.0f} s", flush=True)
    result: dict[str, Any] = {
        "command": f"python -m tests.engine.grid_count --part {args.part}",
        "cells": len(all_found),
        "outside the tolerances": len(outside),
        "tolerances (loss, norm relative; weight absolute)": limits,
        "largest differences": {k: max(getattr(f, k) for f in all_found) for k in ("loss", "norm", "weight")},
        "mixers": names,
        "meshes": len({m for m in meshes for x in names if _forms(args.part, m, x)}),
        "minutes": round((time.monotonic() - begin) / 60, 1),
        "details": outside[:5],
    }
    print(json.dumps(result, indent=1))
    if args.output:
        stored = json.loads(args.output.read_text()) if args.output.is_file() else {}
        args.output.write_text(json.dumps({**stored, args.part: result}, indent=1) + "\n")
    return int(bool(outside))


def _forms(part: str, mesh: Mesh3, mixer: str) -> list[Form]:
    if part in CONTEXT:
        return [form for name, form in CONTEXT[part](mesh) if name == mixer]
    return [form for form in forms_of(part) if possible(mixer, mesh, form)]


def _cells(part: str, mesh: Mesh3, mixer: str) -> dict[Form, Difference | str]:
    forms = _forms(part, mesh, mixer)
    return dict(zip(forms, run_cells(mesh, [(mixer, form) for form in forms], 600), strict=True)) if forms else {}


def _fits(found: Difference | str, limits: tuple[float, float | None, float | None]) -> bool:
    if isinstance(found, str):
        return False
    values = (found.loss, found.norm, found.weight)
    return all(limit is None or value <= limit for value, limit in zip(values, limits, strict=True))


if __name__ == "__main__":
    sys.exit(main())
