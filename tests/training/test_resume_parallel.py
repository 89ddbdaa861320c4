"""Stop and resume on real ranks with the DeepSpeed engine: bit-equal to the uninterrupted run, on every axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.load import read_full_weights, verify_checkpoint
from tests.parallel.ranks import run_ranks
from tests.training.runs import make_engine, options, train

CASES = {
    "pp2": {"pp": 2},
    "dp2-zero1": {"zero_stage": 1},
    "pp2-tp2-bf16-zero1": {"pp": 2, "tp": 2, "zero_stage": 1, "dtype": "bf16"},
}


def job(folder: str | None, stop: int | None, resume: bool, engine: dict[str, Any]) -> list[tuple[int, float, float]]:
    made = make_engine(kind="deepspeed", **engine)
    path = Path(folder) if folder else None
    _, recorder = train(made, path, options(12, exit_interval=stop), resume=resume)
    made.close()
    return [(s.iteration, s.loss, s.grad_norm) for s in recorder.steps]


def _world(case: dict[str, Any]) -> int:
    return 4 if case.get("pp", 1) * case.get("tp", 1) == 4 else 2


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_stop_and_resume(tmp_path: Path, name: str) -> None:
    case, world = CASES[name], _world(CASES[name])
    whole = run_ranks(job, world, None, None, False, case, timeout=120)
    first = run_ranks(job, world, str(tmp_path), 7, False, case, timeout=120)
    rest = run_ranks(job, world, str(tmp_path), None, True, {**case, "seed": 99}, timeout=120)
    for rank in range(world):
        assert first[rank] == whole[rank][:7]
        assert rest[rank] == whole[rank][7:]
    for step in (7, 12):
        verify_checkpoint(tmp_path / f"global_step{step}")
    assert all(bool(torch.isfinite(w.float()).all()) for w in read_full_weights(tmp_path / "global_step12").values())
