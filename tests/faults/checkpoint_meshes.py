"""Save on one mesh, resume on another, real ranks: weights and optimizer bit-equal once gathered, the next loss within 1e-6.

    python -m tests.faults.checkpoint_meshes [--dtype fp32] [--quick] [--output result.json]

Every mesh of at most four ranks saves after three steps and then takes a fourth, the uninterrupted run. Every mesh then resumes
from all of them in turn and takes the fourth step. Gathering is done here with plain index arrays, not with the code under
test.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from megatron.checkpoint.save import save_checkpoint
from megatron.parallel.shard_spec import slice_of
from tests.faults.checkpoint_run import Run, model_of
from tests.faults.report import as_typed, store
from tests.parallel.ranks import run_ranks

Mesh3 = tuple[int, int, int]  # pipeline, data, tensor
MESHES: tuple[Mesh3, ...] = (
    (1, 1, 1),
    (2, 1, 1),
    (1, 2, 1),
    (1, 1, 2),
    (4, 1, 1),
    (1, 4, 1),
    (1, 1, 4),
    (2, 2, 1),
    (2, 1, 2),
    (1, 2, 2),
)
Pieces = list[tuple[str, np.ndarray, np.ndarray]]  # name and kind, global element numbers, values


def pieces(run: Run) -> Pieces:
    """This rank's numbers and where they belong."""
    found: Pieces = []
    slices = run.engine.optimizer_slices()
    for name, weight in run.engine.weights().items():
        spec = run.engine.specs[name]
        part = slice_of(spec.shape, spec.cut, run.mesh.tp_rank, run.mesh.tp)
        numbers = np.arange(int(np.prod(spec.shape, dtype=np.int64))).reshape(spec.shape)
        if part.dim is not None:
            numbers = numbers.take(range(part.start, part.stop), axis=part.dim)
        numbers = numbers.reshape(-1)
        found.append((name, numbers, weight.float().cpu().numpy().reshape(-1).copy()))
        if name in slices:
            own = slices[name]
            for kind, value in {"master": own.master, **own.moments}.items():
                found.append((f"{name} {kind}", numbers[own.start : own.stop], value.cpu().numpy().copy()))
            found.append((f"{name} step", np.zeros(1, dtype=np.int64), np.array([own.step])))
    return found


def gathered(ranks: list[Pieces]) -> dict[str, np.ndarray]:
    """All ranks' pieces as full flat tensors; an element that two ranks hold must be equal on both."""
    sizes: dict[str, int] = {}
    for rank in ranks:
        for name, numbers, _ in rank:
            sizes[name] = max(sizes.get(name, 0), int(numbers.max(initial=-1)) + 1)
    full = {name: np.full(size, np.nan) for name, size in sizes.items()}
    for rank in ranks:
        for name, numbers, values in rank:
            there = full[name][numbers]
            assert np.all(np.isnan(there) | (there == values)), f"ranks disagree about {name}"
            full[name][numbers] = values
    return full


def save_job(folder: str, mesh: Mesh3, dtype: str, zero_stage: int) -> tuple[Pieces, str]:
    """Three steps, a save, the fourth step; what was saved and the fourth loss."""
    run = Run("deepspeed", model_of(4, dropout=0.0), pp=mesh[0], tp=mesh[2], zero_stage=zero_stage, dtype=dtype)
    for _ in range(3):
        run.step()
    save_checkpoint(Path(folder), run.engine, run.state, **run.options)
    saved = pieces(run)
    loss = run.step()[0]
    run.engine.close()
    return saved, loss


def load_job(folders: list[str], mesh: Mesh3, dtype: str, zero_stage: int) -> list[tuple[Pieces, str, list[int]]]:
    """Resume from each folder and take one step."""
    run = Run("deepspeed", model_of(4, dropout=0.0), pp=mesh[0], tp=mesh[2], seed=7, zero_stage=zero_stage, dtype=dtype)
    found = []
    for folder in folders:
        run.resume(Path(folder))
        loaded = pieces(run)
        found.append((loaded, run.step()[0], [run.iteration, run.cursor]))
    run.engine.close()
    return found


def run_pairs(
    base: Path,
    saved_on: tuple[Mesh3, ...],
    loaded_on: tuple[Mesh3, ...],
    dtype: str = "fp32",
    zero: tuple[int, int] = (1, 1),
) -> dict[str, Any]:
    """All pairs; what was found. zero: ZeRO stage at the save and at the load; where both are one, no mesh meets itself."""
    before: dict[Mesh3, tuple[dict[str, np.ndarray], float]] = {}
    for mesh in saved_on:
        ranks = run_ranks(save_job, int(np.prod(mesh)), str(base / str(mesh)), mesh, dtype, zero[0], timeout=180)
        before[mesh] = (gathered([r[0] for r in ranks]), float.fromhex(ranks[0][1]))
    wrong, worst, pairs = list[str](), 0.0, 0
    for mesh in loaded_on:
        froms = [m for m in saved_on if m != mesh or zero != (1, 1)]
        folders = [str(base / str(m)) for m in froms]
        ranks = run_ranks(load_job, int(np.prod(mesh)), folders, mesh, dtype, zero[1], timeout=240)
        for i, origin in enumerate(froms):
            pairs += 1
            full, loss = gathered([rank[i][0] for rank in ranks]), float.fromhex(ranks[0][i][1])
            expected, unbroken = before[origin]
            if set(full) != set(expected) or any(not np.array_equal(full[n], expected[n], equal_nan=True) for n in expected):
                wrong.append(f"{origin} -> {mesh}: weights or optimizer differ")
            if ranks[0][i][2] != [4, 16]:
                wrong.append(f"{origin} -> {mesh}: the cursor is {ranks[0][i][2]}")
            worst = max(worst, abs(loss - unbroken) / abs(unbroken))
    return {"pairs": pairs, "differ": len(wrong), "worst relative difference of the next loss": worst, "details": wrong[:5]}


def main() -> None:
    """All pairs, or the 36 that save on four meshes; exit code 1 when anything differed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON to put the count into")
    args = parser.parse_args()
    saved_on = MESHES[:4] if args.quick else MESHES
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as base:
        found = run_pairs(Path(base), saved_on, MESHES, args.dtype)
    print(json.dumps(found, indent=1))
    store(args.output, f"mesh pairs {args.dtype}", as_typed(__file__), found)
    limit = 1e-6 if args.dtype == "fp32" else 5e-3  # bf16: partial sums meet in another order
    raise SystemExit(bool(found["differ"]) or found["worst relative difference of the next loss"] > limit)


if __name__ == "__main__":
    main()
