"""What a save makes durable and in which order, that its pieces are whole before the old checkpoint goes, what replica is read.

The order is read from the calls themselves: each sync with the path behind its descriptor, each rename, each removal.
"""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from megatron.checkpoint import commit
from megatron.checkpoint.manifest import OptimizerPart
from megatron.checkpoint.reshard import Place, chosen_parts
from megatron.checkpoint.safetensors_writer import write_files
from megatron.checkpoint.save import save_checkpoint
from megatron.checkpoint.shard_contents import engine_holdings
from megatron.checkpoint.shard_manifests import take_receipts, write_receipt
from megatron.errors import CheckpointError
from megatron.files import write_text
from megatron.parallel.mesh import Mesh
from tests.checkpoint.fakes import MODEL, SPECS, FakeEngine

Event = tuple[str, ...]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """Syncs, renames and removals of this process, as they come."""
    found: list[Event] = []
    fsync, rename, replace, rmtree = os.fsync, os.rename, os.replace, shutil.rmtree

    def synced(fd: int) -> None:
        found.append(("sync", os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    def renamed(source: str | Path, target: str | Path) -> None:
        found.append(("rename", str(source), str(target)))
        rename(source, target)

    def replaced(source: str | Path, target: str | Path) -> None:
        found.append(("rename", str(source), str(target)))
        replace(source, target)

    def removed(path: str | Path, **options: bool) -> None:
        found.append(("remove", str(path)))
        rmtree(path, **options)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(shutil, "rmtree", removed)
    return found


def _at(events: list[Event], kind: str, ending: str, last: str = "") -> int:
    """The first event of a kind whose (last) path ends so."""
    return next(
        i for i, e in enumerate(events) if e[0] == kind and e[-1].endswith(ending) and (not last or e[1].endswith(last))
    )


@pytest.mark.parametrize("direct", [False, True])
def test_a_name_is_given_when_everything_under_it_is_durable(
    tmp_path: Path, events: list[Event], direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if direct:
        monkeypatch.setattr("megatron.checkpoint.safetensors_writer._DIRECT_FROM", 1)
    texts = {"a.yml": "num_layers: 1\n"}
    final = save_checkpoint(tmp_path, FakeEngine(), {"iteration": 7}, model_config=MODEL, config_texts=texts)
    named = _at(events, "rename", "/global_step7")
    temporary = events[named][1]
    before = {path for kind, path, *_ in events[:named] if kind == "sync"}
    places = {
        event[1]: event[2] for event in events[:named] if event[0] == "rename"
    }  # files that were written under another name
    durable = before | {places[path] for path in before if path in places}
    for path in final.rglob("*"):
        assert f"{temporary}/{path.relative_to(final)}" in durable, path
    assert temporary in durable
    folder = next(i for i, e in enumerate(events) if i > named and e == ("sync", str(tmp_path)))
    latest = _at(events, "rename", "/latest")
    assert named < folder < latest
    assert ("sync", str(tmp_path)) in events[latest:]


def test_an_overwritten_step_is_set_aside_and_removed_last(tmp_path: Path, events: list[Event]) -> None:
    for seed in (1, 2):
        events.clear()
        save_checkpoint(tmp_path, FakeEngine(seed=seed), {"iteration": 7}, model_config=MODEL)
    aside = next(i for i, e in enumerate(events) if e[0] == "rename" and ".old-" in e[2])
    named = next(i for i, e in enumerate(events) if e[0] == "rename" and e[2].endswith("/global_step7") and ".tmp-" in e[1])
    gone = next(i for i, e in enumerate(events) if e[0] == "remove" and ".old-" in e[1])
    assert aside < named < _at(events, "rename", "/latest") < gone


def test_a_name_that_cannot_be_given_goes_back_to_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, FakeEngine(seed=1), {"iteration": 7}, model_config=MODEL)
    before, rename = (tmp_path / "global_step7" / "manifest.json").read_bytes(), os.rename

    def refused(source: str | Path, target: str | Path) -> None:
        if ".tmp-" in str(source):
            raise OSError("no more names")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(CheckpointError, match="could not be saved"):
        save_checkpoint(tmp_path, FakeEngine(seed=2), {"iteration": 7}, model_config=MODEL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step7", "latest"]
    assert (tmp_path / "global_step7" / "manifest.json").read_bytes() == before


def test_a_checkpoint_loses_its_name_durably_before_its_files(tmp_path: Path, events: list[Event]) -> None:
    (tmp_path / "global_step5").mkdir()
    commit.delete_checkpoint(tmp_path / "global_step5")
    assert [event[0] for event in events] == ["rename", "sync", "remove"]
    assert events[1][1] == str(tmp_path) and list(tmp_path.iterdir()) == []


def test_a_text_is_synced_before_it_takes_its_name_and_the_folder_after(tmp_path: Path, events: list[Event]) -> None:
    write_text(tmp_path / "latest", "global_step5")
    (first, content), (second, _, name), (third, folder) = events  # type: ignore[misc]
    assert (first, second, third) == ("sync", "rename", "sync")
    assert content.endswith(".tmp") and name.endswith("/latest") and folder == str(tmp_path)


def _receipts(folder: Path, ranks: int) -> None:
    """Files and receipts of the ranks of a mesh of two tensor ranks."""
    for rank in range(ranks):
        mesh = Mesh.shape_only(1, 2, 2, rank)
        holdings = engine_holdings(FakeEngine(mesh), save_optimizer=True, save_rng=False)
        write_receipt(folder, rank, holdings, write_files(folder, holdings.files, {}))


def test_receipts_of_all_ranks_are_one_whole(tmp_path: Path) -> None:
    _receipts(tmp_path, 2)
    joined = take_receipts(tmp_path, 2)
    for name, spec in SPECS.items():
        held = sum(part.range_stop - part.range_start for part in joined.optimizer[name])
        assert len(joined.weights[name].parts) == len(joined.optimizer[name]) == 2, name
        assert held == FakeEngine().parameters()[name].numel() * (2 if spec.cut == "replicated" else 1)
    assert not list(tmp_path.glob("*receipt*"))


def test_a_rank_that_wrote_nothing_leaves_a_hole_that_is_named(tmp_path: Path) -> None:
    _receipts(tmp_path, 1)
    with pytest.raises(CheckpointError, match="was not written completely"):
        take_receipts(tmp_path, 1)
    with pytest.raises(CheckpointError, match="the files of rank 1 did not arrive"):
        take_receipts(tmp_path, 2)


def test_a_save_that_cannot_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(100, 0, 50 << 20))
    commit.check_space(tmp_path, 48 << 20)
    with pytest.raises(CheckpointError, match="not enough free space"):
        commit.check_space(tmp_path, 50 << 20)


def test_of_replicas_the_one_of_the_own_place_is_read() -> None:
    parts = [OptimizerPart(f"{tp}{pp}", pp, tp, None, 0, 0, 0, 4, 1, ("exp_avg",)) for pp in (0, 1) for tp in (0, 1)]
    for pp in (0, 1):
        for tp in (0, 1):
            assert [(p.pp, p.tp) for p in chosen_parts(parts, Place(pp, tp))] == [(pp, tp)]
    assert [(p.pp, p.tp) for p in chosen_parts(parts[:2], Place(1, 1))] == [(0, 1)]
