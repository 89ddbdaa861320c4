"""A save that is killed, or that finds the disk full, at any write, sync or rename: what was whole before is whole after."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.background import Saver
from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.load import load_checkpoint, verify_checkpoint
from megatron.checkpoint.save import SaveOptions, save_checkpoint
from megatron.errors import CheckpointError
from tests.checkpoint.fakes import MODEL, FakeEngine

MEMORY = Path("/dev/shm")
CALLS = ("fsync", "fdatasync", "ftruncate", "pwrite", "replace", "rename", "rmdir", "unlink", "mkdir")


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of saves, each with dozens of syncs."""
    if not os.access(MEMORY, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


class Counter:
    """Calls `act` instead of the n-th primitive (n from 1), or after it when `after`."""

    def __init__(self, at: int, act: Callable[[], None], after: bool = False) -> None:
        self.left, self.act, self.after = at, act, after
        self.lock = threading.Lock()  # files are written by several threads

    def wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """`real`, counted."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.lock:
                self.left -= 1
                last = self.left == 0
            if last and not self.after:
                self.act()
            try:
                return real(*args, **kwargs)
            finally:
                if last and self.after:
                    self.act()

        return counted


class _File:
    """A file whose writes are counted."""

    def __init__(self, handle: Any, counter: Counter) -> None:
        self._handle, self.write = handle, counter.wrap(handle.write)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


def install(patch: pytest.MonkeyPatch, counter: Counter) -> None:
    """Count every durable primitive of this process."""
    fdopen = os.fdopen
    patch.setattr(os, "fdopen", lambda *a, **k: _File(fdopen(*a, **k), counter))
    for name in CALLS:
        patch.setattr(os, name, counter.wrap(getattr(os, name)))


def save(folder: Path, step: int, seed: int, **options: Any) -> Path:
    """One small checkpoint."""
    return save_checkpoint(folder, FakeEngine(seed=seed), {"iteration": step}, SaveOptions(model_config=MODEL, **options))


def save_behind(folder: Path, step: int, seed: int, **options: Any) -> Path:
    """The same checkpoint, written by a background thread; the engine's numbers are overwritten meanwhile."""
    saver, engine = Saver(), FakeEngine(seed=seed)
    saver.save(folder, engine, {"iteration": step}, SaveOptions(model_config=MODEL, **options))
    for part in engine.slices.values():
        part.master.zero_()
    path = saver.wait()
    assert path is not None
    return path


def save_directly(folder: Path, step: int, seed: int, **options: Any) -> Path:
    """The same, past the page cache, which tiny files otherwise take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron.checkpoint.safetensors_writer._DIRECT_FROM", 1)
        return save(folder, step, seed, **options)


def killed_save(folder: Path, at: int, after: bool, step: int, keep_last: int | None, how: Callable[..., Path]) -> bool:
    """In a forked process: save, and die at the given primitive. Whether it got to the end before that."""
    child = os.fork()
    if child == 0:
        counter = Counter(at, lambda: os._exit(9), after)
        install(pytest.MonkeyPatch(), counter)
        code = 1
        try:
            how(folder, step, 2, keep_last=keep_last)
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 0


def whole(folder: Path, *, done: bool, step: int) -> None:
    """What a run finds after the kill is one whole generation, and the next save clears the rest."""
    path = find_checkpoint(folder)
    assert path is not None
    verify_checkpoint(path)
    engine = FakeEngine(seed=3)
    state = load_checkpoint(path, engine)
    generation = next(seed for seed in (1, 2) if engine.same_as(FakeEngine(seed=seed)))
    if generation == 2:
        assert state["iteration"] == step
    else:
        assert state["iteration"] == 7
        assert not done
    save(folder, 11, 4)
    names = [p.name for p in folder.iterdir()]
    assert not [name for name in names if "-" in name], names
    assert find_checkpoint(folder) == folder / "global_step11"


@pytest.mark.parametrize(
    ("step", "keep_last", "how", "after"),
    [
        (9, None, save, False),
        pytest.param(7, 2, save_directly, False, marks=pytest.mark.slow),
        (7, None, save, False),
        pytest.param(9, 2, save_behind, False, marks=pytest.mark.slow),
        pytest.param(9, 2, save, False, marks=pytest.mark.slow),
        pytest.param(7, None, save_behind, True, marks=pytest.mark.slow),
        pytest.param(9, 2, save, True, marks=pytest.mark.slow),
    ],
    ids=["new", "directly", "overwrite", "behind-delete", "delete", "behind-overwrite-after", "delete-after"],
)
def test_killed_at_every_boundary(quick: Path, step: int, keep_last: int | None, how: Callable[..., Path], after: bool) -> None:
    base = quick / "base"
    if keep_last:
        save(base, 5, 3)
    save(base, 7, 1)
    done, at = False, 0
    while not done:
        at += 1
        folder = quick / f"at{at}"
        shutil.copytree(base, folder)
        done = killed_save(folder, at, after, step, keep_last, how)
        whole(folder, done=done, step=step)
        shutil.rmtree(folder)
    assert at > 20, "the primitives were not counted"


@pytest.mark.parametrize("step", [9, 7], ids=["new", "overwrite"])
def test_full_disk_at_every_boundary(quick: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    base = quick / "base"
    save(base, 7, 1)
    failures, at, done = 0, 0, False
    while not done:
        at += 1
        folder = quick / f"at{at}"
        shutil.copytree(base, folder)
        with monkeypatch.context() as patch:
            counter = Counter(at, fail)
            install(patch, counter)
            said = ""
            try:
                save(folder, step, 2)
            except CheckpointError as error:
                said = str(error)
        failures += bool(said)
        assert not said or ("No space left" in said and "earlier ones are untouched" in said)
        done = counter.left > 0
        assert not [p for p in folder.iterdir() if ".tmp-" in p.name]
        whole(folder, done=False, step=step)
        shutil.rmtree(folder)
    assert failures > 20


def test_a_really_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:
        with pytest.raises(CheckpointError, match="not enough free space(.|\n)*are free"):
            save(disk / "a", 7, 1)
        monkey = pytest.MonkeyPatch()
        monkey.setattr("megatron.checkpoint.commit.check_space", lambda *_: None)
        save(disk, 7, 1)
        (disk / "ballast").write_bytes(bytes(100 * 1024))
        with pytest.raises(CheckpointError, match="No space left"):
            save(disk, 9, 2)
        monkey.undo()
        assert sorted(p.name for p in disk.iterdir() if p.name != "a") == ["ballast", "global_step7", "latest"]
        verify_checkpoint(disk / "global_step7")
        assert find_checkpoint(disk) == disk / "global_step7"
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="step 7 could not be saved"):
        save(tmp_path / "file", 7, 1)


def test_deletion_that_fails_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 5, 1)
    save(tmp_path, 7, 1)
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*_: object) -> None:
            raise PermissionError("no")

        patch.setattr("megatron.checkpoint.retention.delete_checkpoint", refuse)
        assert save(tmp_path, 9, 2, keep_last=2).name == "global_step9"
    assert "could not delete" in caplog.text


def test_leftovers_are_reported_and_cleared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 7, 1)
    (tmp_path / "global_step8.tmp-0123456789ab").mkdir()
    (tmp_path / "global_step3.trash-0123456789ab").mkdir()
    (tmp_path / "global_step8.tmp-mine.txt").write_text("stays")
    save(tmp_path, 9, 2)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["global_step7", "global_step8.tmp-mine.txt", "global_step9", "latest"]
    assert "interrupted save" in caplog.text


def test_an_interrupted_overwrite_is_found_and_healed(tmp_path: Path) -> None:
    path = save(tmp_path, 7, 1)
    path.rename(tmp_path / "global_step7.old-0123456789ab")
    found = find_checkpoint(tmp_path)
    assert found is not None and found.name == "global_step7.old-0123456789ab"
    engine = FakeEngine(seed=2)
    load_checkpoint(found, engine)
    assert engine.same_as(FakeEngine(seed=1))
    save(tmp_path, 9, 2)
    verify_checkpoint(tmp_path / "global_step7")
