"""Saving and loading with real gloo ranks: files of every rank, one manifest, one verdict."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.checkpoint.collective_errors import exchange
from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.load import load_checkpoint, read_full_weights, verify_checkpoint
from megatron.checkpoint.manifest import read_manifest
from megatron.checkpoint.save import save_checkpoint
from megatron.errors import CheckpointError
from megatron.parallel.mesh import Mesh
from tests.checkpoint.fakes import MODEL, SPECS, FakeEngine, full
from tests.parallel.ranks import run_ranks

MESHES = [(1, 1, 2), (1, 2, 1), (2, 1, 1), (2, 1, 2), (1, 2, 2), (2, 2, 1)]


def mesh_of(pp: int, dp: int, tp: int) -> Mesh:
    """This rank's place, without groups: checkpoints use the default process group only."""
    return Mesh(pp, dp, tp, dist.get_rank() if dist.is_initialized() else 0)


def save_and_load(folder: str, pp: int, dp: int, tp: int, zero: bool) -> bool:
    mesh = mesh_of(pp, dp, tp)
    torch.manual_seed(100 + mesh.rank)
    path = save_checkpoint(folder, FakeEngine(mesh, 1, zero), {"iteration": 7}, model_config=MODEL)
    expected = torch.rand(4)
    torch.manual_seed(5)
    engine = FakeEngine(mesh, 2, zero)
    found = find_checkpoint(folder)
    assert found == path
    state = load_checkpoint(path, engine, model_config=MODEL)
    return state == {"iteration": 7} and engine.same_as(FakeEngine(mesh, 1, zero)) and torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    "mesh", [pytest.param(m, marks=pytest.mark.slow if m in MESHES[1:5] else (), id=str(m)) for m in MESHES]
)
def test_every_mesh_round_trips_and_joins(tmp_path: Path, mesh: tuple[int, int, int]) -> None:
    pp, dp, tp = mesh
    assert all(run_ranks(save_and_load, pp * dp * tp, str(tmp_path), *mesh, True))
    path = tmp_path / "global_step7"
    weights = read_full_weights(path)
    assert set(weights) == set(SPECS)
    assert all(torch.equal(weights[name], full(name, 1).bfloat16()) for name in SPECS)
    names = {p.name for p in path.iterdir()}
    assert {f"layer_{s:02d}-model_{t:02d}.safetensors" for s in (0, 2, 3) for t in range(tp)} <= names
    assert {f"rng-rank{r}.safetensors" for r in range(pp * dp * tp)} <= names
    assert {f"optim-dp{d}-pp{p}-tp{t}.safetensors" for d in range(dp) for p in range(pp) for t in range(tp)} <= names
    assert not [name for name in names if name.startswith("receipt")]
    verify_checkpoint(path)


@pytest.mark.slow
def test_without_zero_the_optimizer_is_written_once(tmp_path: Path) -> None:
    assert all(run_ranks(save_and_load, 2, str(tmp_path), 1, 2, 1, False))
    names = sorted(p.name for p in (tmp_path / "global_step7").glob("optim*"))
    assert names == ["optim-dp0-pp0-tp0.safetensors"]


def load_elsewhere(folder: str, pp: int, dp: int, tp: int) -> bool:
    mesh = mesh_of(pp, dp, tp)
    path = find_checkpoint(folder)
    assert path is not None
    engine = FakeEngine(mesh, 2)
    load_checkpoint(path, engine)
    return engine.same_as(FakeEngine(mesh, 1)) and not engine.refreshed


@pytest.mark.slow
def test_weights_and_optimizers_load_on_any_mesh(tmp_path: Path) -> None:
    run_ranks(save_and_load, 4, str(tmp_path / "a"), 2, 1, 2, True)
    run_ranks(save_and_load, 2, str(tmp_path / "b"), 1, 2, 1, True)
    for folder, mesh in (("a", (1, 1, 1)), ("a", (1, 1, 4)), ("a", (2, 2, 1)), ("b", (2, 1, 2)), ("b", (1, 1, 2))):
        assert all(run_ranks(load_elsewhere, mesh[0] * mesh[1] * mesh[2], str(tmp_path / folder), *mesh))


def fail_on_rank_one(folder: str, when: str) -> str:
    mesh = mesh_of(1, 2, 1)
    save_checkpoint(folder, FakeEngine(mesh, 1), {"iteration": 7}, model_config=MODEL)
    guilty = mesh.rank == (0 if when in ("publish", "prepare") else 1)

    def full_disk(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch = pytest.MonkeyPatch()
    targets = {
        "write": "megatron.checkpoint.save.write_files",
        "receipt": "megatron.checkpoint.save.write_receipt",
        "publish": "megatron.checkpoint.commit.publish",
        "prepare": "megatron.checkpoint.commit.recover",
    }
    if guilty:
        patch.setattr(targets[when], full_disk)
    try:
        save_checkpoint(folder, FakeEngine(mesh, 2), {"iteration": 9}, model_config=MODEL)
    except CheckpointError as error:
        text = str(error)
    else:
        text = "saved"
    patch.undo()
    engine = FakeEngine(mesh, 3)
    load_checkpoint(find_checkpoint(folder) or "", engine)
    assert engine.same_as(FakeEngine(mesh, 1))
    return text


@pytest.mark.parametrize(
    "when", ["write", *(pytest.param(w, marks=pytest.mark.slow) for w in ("prepare", "receipt", "publish"))]
)
def test_a_full_disk_on_one_rank_is_the_same_error_on_all(tmp_path: Path, when: str) -> None:
    texts = run_ranks(fail_on_rank_one, 2, str(tmp_path), when)
    assert texts[0] == texts[1]
    assert "No space left" in texts[0]
    assert f"seen by rank {0 if when in ('publish', 'prepare') else 1} of 2" in texts[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step7", "latest"]


def load_damaged(folder: str, pp: int, dp: int, tp: int) -> str:
    mesh = mesh_of(pp, dp, tp)
    engine = FakeEngine(mesh, 2)
    try:
        load_checkpoint(find_checkpoint(folder) or "", engine)
    except CheckpointError as error:
        assert engine.same_as(FakeEngine(mesh, 2)), "an engine was changed although the load failed"
        return str(error)
    return "loaded"


def test_one_ranks_damaged_file_stops_all(tmp_path: Path) -> None:
    run_ranks(save_and_load, 2, str(tmp_path), 1, 1, 2, True)
    file = tmp_path / "global_step7" / "layer_02-model_01.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    texts = run_ranks(load_damaged, 2, str(tmp_path), 1, 1, 2)
    assert texts[0] == texts[1]
    assert "layer_02-model_01" in texts[0] and "seen by rank 1" in texts[0]


def say(text: str) -> list[str]:
    return exchange(text * (dist.get_rank() + 1))


def test_exchange() -> None:
    assert exchange("alone") == ["alone"]
    assert run_ranks(say, 3, "é!") == [["é!", "é!é!", "é!é!é!"]] * 3
    assert run_ranks(say, 2, "") == [["", ""]] * 2


def test_the_manifest_tells_holders_apart(tmp_path: Path) -> None:
    run_ranks(save_and_load, 4, str(tmp_path), 2, 1, 2, True)
    parts = read_manifest(tmp_path / "global_step7").optimizer["model.embed_tokens.weight"]
    assert sorted((p.pp, p.tp, p.start) for p in parts) == [(0, 0, 0), (0, 1, 8), (1, 0, 0), (1, 1, 8)]
