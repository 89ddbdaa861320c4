"""Saves in the background: the bytes of a save in the foreground, one at a time, errors at the next step."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.checkpoint.background import Saver
from megatron.checkpoint.layout import MANIFEST
from megatron.checkpoint.load import load_checkpoint, verify_checkpoint
from megatron.checkpoint.safetensors_writer import write_files
from megatron.checkpoint.save import save_checkpoint
from megatron.errors import CheckpointError
from megatron.parallel.mesh import Mesh
from tests.checkpoint.fakes import MODEL, FakeEngine
from tests.parallel.ranks import run_ranks

ID = "0123456789ab"


def tree(path: Path) -> dict[str, bytes]:
    """All files of a checkpoint."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def spoil(engine: FakeEngine) -> None:
    """What a training step does to the engine's memory."""
    with torch.no_grad():
        for parameter in engine.parameters().values():
            parameter.fill_(float("nan"))
        for part in engine.slices.values():
            part.master.fill_(float("nan"))
            for moment in part.moments.values():
                moment.fill_(float("nan"))


def same_bytes(folder: str) -> bool:
    """Both ways of saving, with one save id; the engine is spoilt while the background writes."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    mesh = Mesh(1, world, 1, dist.get_rank() if world > 1 else 0)
    gate, patch = threading.Event(), pytest.MonkeyPatch()

    def slow(*args: Any, **kwargs: Any) -> Any:
        assert gate.wait(20)
        return write_files(*args, **kwargs)

    patch.setattr("megatron.checkpoint.commit.new_save_id", lambda: ID)
    torch.manual_seed(1 + mesh.rank)
    first = save_checkpoint(Path(folder) / "a", FakeEngine(mesh, 1), {"iteration": 7}, model_config=MODEL)
    patch.setattr("megatron.checkpoint.save.write_files", slow)
    engine, saver = FakeEngine(mesh, 1), Saver()
    second = saver.save(Path(folder) / "b", engine, {"iteration": 7}, model_config=MODEL)
    assert saver.poll() is None
    assert not second.exists()
    spoil(engine)
    torch.manual_seed(99)
    gate.set()
    assert saver.wait() == second
    assert saver.poll() is None and saver.wait() is None
    patch.undo()
    if world > 1:
        dist.barrier()
    return tree(first) == tree(second)


def test_the_bytes_are_those_of_a_save_in_the_foreground(tmp_path: Path) -> None:
    assert same_bytes(str(tmp_path / "one"))
    assert all(run_ranks(same_bytes, 2, str(tmp_path / "two")))


def test_buffers_are_reused_and_saves_follow_each_other(tmp_path: Path) -> None:
    saver, engine = Saver(), FakeEngine(seed=1)
    places = []
    for step in (1, 2, 3):
        saver.save(tmp_path, engine, {"iteration": step}, model_config=MODEL, keep_last=2)
        places.append(sorted(t.data_ptr() for t in saver._copy._buffers.values()))
    saver.wait()
    assert places[0] == places[1] == places[2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step2", "global_step3", "latest"]
    verify_checkpoint(tmp_path / "global_step2")


def failing(folder: str, how: str) -> list[str]:
    """Rank 1's disk is full; every rank hears of it at the same step, and the next save works."""
    mesh = Mesh(1, 2, 1, dist.get_rank())
    saver, patch = Saver(), pytest.MonkeyPatch()

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    saver.save(folder, FakeEngine(mesh, 1), {"iteration": 7}, model_config=MODEL)
    saver.wait()
    if mesh.rank == 1:
        patch.setattr("megatron.checkpoint.save.write_files", full)
    saver.save(folder, FakeEngine(mesh, 2), {"iteration": 9}, model_config=MODEL)
    said = []
    for step in range(10, 2000):
        try:
            if how == "poll":
                if saver.poll() is not None:
                    break
            else:
                saver.save(folder, FakeEngine(mesh, 2), {"iteration": 11}, model_config=MODEL)
        except CheckpointError as error:
            said = [f"{step if how == 'save' else ''}{error}"]
            break
    patch.undo()
    saver.save(folder, FakeEngine(mesh, 3), {"iteration": 12}, model_config=MODEL)
    path = saver.wait()
    assert path is not None
    engine = FakeEngine(mesh, 4)
    load_checkpoint(path, engine)
    assert engine.same_as(FakeEngine(mesh, 3))
    return said


@pytest.mark.slow
@pytest.mark.parametrize("how", ["poll", "save"])
def test_a_failure_surfaces_on_all_ranks_at_the_same_moment(tmp_path: Path, how: str) -> None:
    texts = run_ranks(failing, 2, str(tmp_path), how)
    assert texts[0] == texts[1] and len(texts[0]) == 1
    assert "No space left" in texts[0][0] and "earlier ones are untouched" in texts[0][0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step12", "global_step7", "latest"]


def test_the_manifest_of_a_state_that_goes_on(tmp_path: Path) -> None:
    """The state is a copy as well: the loop counts on in its own."""
    state = {"iteration": 7, "consumed_samples": 56}
    saver = Saver()
    path = saver.save(tmp_path, FakeEngine(), state, model_config=MODEL)
    state["iteration"] = 8
    saver.wait()
    assert (path / MANIFEST).is_file()
    assert load_checkpoint(path, FakeEngine(seed=2)) == {"iteration": 7, "consumed_samples": 56}
