"""Falling back: a damaged newest checkpoint is skipped by all ranks alike, and what was skipped is said."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron.checkpoint.compare import check_model
from megatron.checkpoint.find import candidates
from megatron.checkpoint.layout import MANIFEST
from megatron.checkpoint.load import LoadOptions
from megatron.checkpoint.resume import resume
from megatron.checkpoint.save import SaveOptions, save_checkpoint
from megatron.errors import CheckpointError
from megatron.parallel.mesh import Mesh
from tests.checkpoint.fakes import MODEL, FakeEngine
from tests.parallel.ranks import run_ranks

SHARD = "layer_02-model_00.safetensors"


def save(folder: Path, step: int, mesh: Mesh | None = None) -> Path:
    """A checkpoint whose seed is its step."""
    return save_checkpoint(folder, FakeEngine(mesh, step), {"iteration": step}, SaveOptions(model_config=MODEL))


def flip(file: Path) -> None:
    """Damage one bit."""
    data = bytearray(file.read_bytes())
    data[-3] ^= 8
    file.write_bytes(data)


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Steps 3, 5 and 8."""
    for step in (3, 5, 8):
        save(tmp_path, step)
    return tmp_path


def test_the_newest_when_it_is_good(three: Path) -> None:
    engine = FakeEngine(seed=1)
    found = resume(three, engine, LoadOptions(model_config=MODEL))
    assert (found.path, found.state, found.skipped) == (three / "global_step8", {"iteration": 8}, ())
    assert engine.same_as(FakeEngine(seed=8))


def test_back_to_the_one_before(three: Path, caplog: pytest.LogCaptureFixture) -> None:
    flip(three / "global_step8" / SHARD)
    (three / "global_step5" / MANIFEST).write_text("{")
    engine = FakeEngine(seed=1)
    found = resume(three, engine)
    assert found.path == three / "global_step3" and engine.same_as(FakeEngine(seed=3))
    assert len(found.skipped) == 2
    for text in ("global_step8", SHARD, "SHA-256", "global_step5", "not readable as JSON", "resuming from"):
        assert text in caplog.text


def test_without_verification_the_damage_is_loaded(three: Path) -> None:
    flip(three / "global_step8" / SHARD)
    assert resume(three, FakeEngine(), LoadOptions(verify=False)).path == three / "global_step8"


def test_an_explicit_step_never_falls_back(three: Path) -> None:
    flip(three / "global_step8" / SHARD)
    engine = FakeEngine(seed=1)
    for where, iteration in ((three, 8), (three / "global_step8", None)):
        with pytest.raises(CheckpointError, match=SHARD) as caught:
            resume(where, engine, iteration=iteration)
        assert "no checkpoint can be used" not in str(caught.value), "it is about one, not about all of them"
    assert engine.same_as(FakeEngine(seed=1))


def test_none_is_whole(three: Path) -> None:
    for step in (3, 5, 8):
        flip(three / f"global_step{step}" / SHARD)
    with pytest.raises(CheckpointError, match="no checkpoint can be used") as caught:
        resume(three, FakeEngine(), save_dir=three)
    assert all(f"global_step{step}" in str(caught.value) for step in (3, 5, 8))
    assert caught.value.exit_code == 4


def test_another_model_is_no_damage(three: Path) -> None:
    with pytest.raises(CheckpointError, match="of another model"):
        resume(three, FakeEngine(), LoadOptions(model_config={**MODEL, "hidden_size": 16}))


def test_another_padding_of_the_vocabulary_names_its_key(tmp_path: Path) -> None:
    """The same configuration with another tensor parallel size, where nothing else differs."""
    manifest: Any = SimpleNamespace(model_config={**MODEL, "vocab_size": 640})
    with pytest.raises(CheckpointError, match="padded_vocab_size: 640, if only model_parallel_size has changed"):
        check_model(tmp_path, manifest, {**MODEL, "vocab_size": 768})
    with pytest.raises(CheckpointError) as caught:
        check_model(tmp_path, manifest, {**MODEL, "vocab_size": 768, "hidden_size": 16})
    assert "padded_vocab_size" not in str(caught.value)


@pytest.mark.parametrize(("content", "step"), [("nonsense", 8), ("global_step7", 5), ("global_step5", 5), (None, 8)])
def test_latest_is_a_hint(three: Path, content: str | None, step: int) -> None:
    if content is None:
        (three / "latest").unlink()
    else:
        (three / "latest").write_text(content)
    found = resume(three, FakeEngine())
    assert found.path == three / f"global_step{step}"
    assert bool(found.skipped) == (content in ("nonsense", "global_step7"))


def test_after_a_rewind_newer_ones_come_last(three: Path) -> None:
    (three / "latest").write_text("global_step5")
    assert [p.name for p in candidates(three).paths] == ["global_step5", "global_step3", "global_step8"]


def test_a_folder_whose_only_checkpoint_lost_its_manifest_is_no_fresh_start(tmp_path: Path) -> None:
    (save(tmp_path, 8) / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        resume(tmp_path, FakeEngine(), save_dir=tmp_path)


def test_a_fresh_start(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "new"):
        assert resume(folder, FakeEngine(), save_dir=folder).path is None
    with pytest.raises(CheckpointError, match="does not exist"):
        resume(tmp_path / "typo", FakeEngine(), save_dir=tmp_path)


def on_ranks(folder: str, damage: bool) -> tuple[str, bool, tuple[str, ...]]:
    mesh = Mesh(1, 1, 2, dist.get_rank())
    for step in (3, 8):
        path = save(Path(folder), step, mesh)
    if damage and mesh.rank == 1:
        flip(path / "layer_02-model_01.safetensors")  # rank 0 never reads it
    dist.barrier()
    engine = FakeEngine(mesh, 1)
    found = resume(folder, engine)
    assert found.path is not None
    return found.path.name, engine.same_as(FakeEngine(mesh, found.state["iteration"])), found.skipped


def test_one_ranks_damage_sends_all_back(tmp_path: Path) -> None:
    results = run_ranks(on_ranks, 2, str(tmp_path), True)
    assert results[0] == results[1]
    name, same, skipped = results[0]
    assert (name, same) == ("global_step3", True)
    assert "layer_02-model_01.safetensors" in skipped[0] and "seen by rank 1 of 2" in skipped[0]
