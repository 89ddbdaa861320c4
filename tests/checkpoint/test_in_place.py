"""Reading straight into the engine's memory: the same numbers, damage is found all the same, and nothing is read twice over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.load import LoadOptions, load_checkpoint
from megatron.checkpoint.resume import resume
from megatron.checkpoint.save import SaveOptions, save_checkpoint
from megatron.engine.base import EngineSettings
from megatron.engine.single_process import SingleProcessEngine
from megatron.errors import DamagedCheckpoint
from tests.checkpoint.fakes import MODEL, FakeEngine
from tests.engine.engine_cases import SEQ, for_step, micro_batches, model_config

SETTINGS = EngineSettings(micro_batch=4, seq_length=SEQ, gradient_accumulation=1)


def single(dtype: str, seed: int = 1234) -> SingleProcessEngine:
    return SingleProcessEngine(model_config(), replace(SETTINGS, dtype=dtype, seed=seed), torch.device("cpu"))


def test_the_numbers_land_in_the_memory_that_was_there(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, FakeEngine(seed=1), {"iteration": 7}, SaveOptions(model_config=MODEL))
    engine = FakeEngine(seed=2)
    tensors = {**engine.weights(), **{f"{n} m": s.moments["exp_avg"] for n, s in engine.slices.items()}}
    load_checkpoint(path, engine, LoadOptions(in_place=True))
    assert engine.same_as(FakeEngine(seed=1))
    now = {**engine.weights(), **{f"{n} m": s.moments["exp_avg"] for n, s in engine.slices.items()}}
    assert {n: t.data_ptr() for n, t in tensors.items()} == {n: t.data_ptr() for n, t in now.items()}
    assert all(torch.equal(tensors[n], now[n]) for n in now)


def damage(folder: Path) -> None:
    """The last byte of the optimizer's file."""
    file = next(folder.glob("optim-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_damage_is_found_before_anything_is_called_loaded(tmp_path: Path) -> None:
    for step, seed in ((5, 1), (7, 3)):
        save_checkpoint(tmp_path, FakeEngine(seed=seed), {"iteration": step}, SaveOptions(model_config=MODEL))
    damage(tmp_path / "global_step7")
    engine, before = FakeEngine(seed=2), FakeEngine(seed=2)
    with pytest.raises(DamagedCheckpoint, match="SHA-256"):
        load_checkpoint(tmp_path / "global_step7", engine)
    assert engine.same_as(before), "without `in_place` an engine keeps its numbers"
    found = resume(tmp_path, engine, LoadOptions(in_place=True))
    assert found.state["iteration"] == 5
    assert engine.same_as(FakeEngine(seed=1)), "of the damaged one nothing is left"


@pytest.mark.parametrize(("saved", "loaded"), [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "bf16")])
def test_masters_survive_a_change_of_precision(tmp_path: Path, saved: str, loaded: str) -> None:
    """In fp32 a master is the weight itself: the rounded weights of a bf16 run must not end up in it."""
    first, second = single(saved), single(loaded, seed=5)
    batches = micro_batches(first.mesh)
    for _ in range(2):
        first.train_step(for_step(first, batches), 1e-2)
    path = save_checkpoint(tmp_path, first, {"iteration": 2}, SaveOptions(model_config={}))
    own = {name: s.moments["exp_avg"].data_ptr() for name, s in second.optimizer_slices().items()}
    load_checkpoint(path, second, LoadOptions(in_place=True))
    for name, want in first.optimizer_slices().items():
        got = second.optimizer_slices()[name]
        assert torch.equal(got.master, want.master)
        assert all(torch.equal(got.moments[m], t) for m, t in want.moments.items())
        assert (got.step, got.moments["exp_avg"].data_ptr()) == (2, own[name])
        assert torch.equal(second.weights()[name].reshape(-1), want.master.to(second.dtype))
    if saved == loaded:
        losses = [float(e.train_step(for_step(e, micro_batches(e.mesh, start=2)), 1e-2).loss) for e in (first, second)]
        assert losses[0] == losses[1]
