"""One run per save folder: a second start is refused by the name of the first, and no lock outlives its run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megatron.errors import CheckpointError, LaunchError
from megatron.launch import lock as lock_file
from megatron.launch.lock import HERE_S, NAME, SILENT_S, FolderLock, Holder, refuse_if_held
from tests.tiny_run import write_run

ROOT = Path(__file__).parents[2]


class Clock:
    """Time that passes only while somebody waits; `meanwhile(seconds)` happens at each wait."""

    def __init__(self, meanwhile: Callable[[float], object] = lambda now: None) -> None:
        self.now, self._meanwhile = 0.0, meanwhile

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.now += seconds
        self._meanwhile(self.now)


def take(folder: Path, clock: Clock | None = None, **more: Any) -> tuple[FolderLock, list[str]]:
    clock, said = clock or Clock(), list[str]()
    return FolderLock.take(folder, "train.py b.yml", said.append, clock=clock, pause=clock.pause, **more), said


def elsewhere(**changes: Any) -> Holder:
    """A run on a machine that is not this one."""
    return replace(Holder.here("train.py a.yml"), host="node7", boot="another", pid=4711, **changes)


def put(folder: Path, holder: Holder) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).write_text(json.dumps(asdict(holder)))


def test_a_folder_is_held_named_and_given_back(tmp_path: Path) -> None:
    first, said = take(tmp_path / "new" / "save")
    clock = Clock()
    with pytest.raises(LaunchError) as refused:
        take(tmp_path / "new" / "save", clock)
    text = str(refused.value)
    assert refused.value.exit_code == 5 and clock.now <= HERE_S + 1
    for word in (str(tmp_path / "new" / "save"), f"pid {os.getpid()} on ", "started 20", "train.py b.yml", "--set save="):
        assert word in text
    first.release()
    assert os.listdir(tmp_path / "new" / "save") == [] and said == []
    take(tmp_path / "new" / "save")[0].release()


def test_a_killed_run_of_this_machine_holds_nothing_back(tmp_path: Path) -> None:
    """Its number may belong to another process by now, which the start time tells apart."""
    code = (
        "import sys, time; from megatron.launch.lock import FolderLock; "
        "FolderLock.take(sys.argv[1], 'x', print); print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    with pytest.raises(LaunchError, match="another run saves into this folder"):
        take(tmp_path)
    begin = time.monotonic()
    child.kill()
    FolderLock.take(tmp_path, "x", print).release()  # not waited for: it is dying, then a zombie
    assert time.monotonic() - begin < HERE_S + 10
    child.wait()
    put(tmp_path, replace(Holder.here("x"), born=1))
    take(tmp_path)[0].release()


def test_a_process_that_is_dying_is_waited_for_longer_than_one_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy machine may need seconds to end a process that was killed; its memory may be large."""
    put(tmp_path, Holder.here("x"))
    born = lock_file._process(os.getpid())
    assert born is not None and not born[1]
    clock = Clock()
    monkeypatch.setattr(lock_file, "_process", lambda pid: (born[0], True) if clock.now < 20 else None)
    held, said = take(tmp_path, clock)
    assert 20 <= clock.now < 21 and "waiting for its end" in said[0]
    held.release()


def test_a_killed_process_is_seen_to_be_dying() -> None:
    child = subprocess.Popen(["sleep", "60"])
    os.kill(child.pid, signal.SIGSTOP)
    found = lock_file._process(child.pid)
    assert found is not None and found[1] is False
    child.kill()
    child.wait()
    assert lock_file._process(child.pid) is None


def test_a_silent_run_of_another_host_is_taken_over_after_its_last_heartbeat(tmp_path: Path) -> None:
    put(tmp_path, elsewhere())
    clock = Clock()
    held, said = take(tmp_path, clock)
    assert SILENT_S <= clock.now <= SILENT_S + 1
    assert "waiting for a sign of life" in said[0] and "pid 4711 on node7" in said[0] and "is taken over" in said[1]
    held.release()


def test_a_living_run_of_another_host_is_named_as_soon_as_it_beats(tmp_path: Path) -> None:
    put(tmp_path, elsewhere())
    clock = Clock(lambda now: put(tmp_path, elsewhere(key="k", beat=int(now // 5))))
    with pytest.raises(LaunchError, match="another run saves into this folder") as refused:
        take(tmp_path, clock)
    assert clock.now < 6 and "pid 4711 on node7" in str(refused.value)


@pytest.mark.parametrize("ends", [True, False])
def test_a_run_that_was_asked_to_leave_is_waited_for(ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_file, "LEAVING_S", 40.0)
    put(tmp_path, elsewhere(leaving=True))

    def meanwhile(now: float) -> None:
        if ends and now > 30:
            (tmp_path / NAME).unlink(missing_ok=True)
        else:
            put(tmp_path, elsewhere(key="k", leaving=True, beat=int(now // 5)))

    clock = Clock(meanwhile)
    if ends:
        held, said = take(tmp_path, clock)
        assert 30 < clock.now < 32 and "waiting for" in said[0]
        held.release()
    else:
        with pytest.raises(LaunchError):
            take(tmp_path, clock)
        assert 40 <= clock.now < 42


def test_a_file_that_nobody_can_read_blocks_no_run_for_long(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"key": 1}', "[" * 5000, json.dumps({**asdict(elsewhere()), "pid": "x"})):
        (tmp_path / NAME).write_text(text)
        clock = Clock()
        held, said = take(tmp_path, clock)
        held.release()
        assert clock.now <= SILENT_S + 1 and "cannot be read" in said[0]


def test_heartbeats_count_up_and_say_that_the_run_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_file, "BEAT_S", 0.02)
    monkeypatch.setattr(lock_file, "_LOOK_S", 0.005)
    asked = threading.Event()
    held, _ = take(tmp_path, leaving=asked.is_set)
    deadline, seen = time.monotonic() + 10, Holder.of((tmp_path / NAME).read_text())
    assert seen is not None and not seen.leaving
    asked.set()
    while time.monotonic() < deadline and not (seen and seen.beat > 2 and seen.leaving):
        time.sleep(0.005)
        seen = Holder.of((tmp_path / NAME).read_text())
    held.release()
    assert seen and seen.beat > 2 and seen.leaving


def test_a_run_that_was_taken_over_while_it_stood_still_leaves(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    left: list[int] = []
    held, _ = take(tmp_path, lost=left.append)
    put(tmp_path, elsewhere(key="other"))
    held.beat()
    assert left == [5] and "was taken over by the run with pid 4711 on node7" in capfd.readouterr().err
    held.release()
    assert (tmp_path / NAME).is_file(), "it is the other run's"


def test_of_many_starts_at_once_one_gets_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of one process, each of which the others must take for a run."""
    monkeypatch.setattr(lock_file, "HERE_S", 0.1)
    won: list[FolderLock] = []
    lost: list[str] = []
    begin = threading.Barrier(6)

    def start() -> None:
        begin.wait()
        try:
            won.append(FolderLock.take(tmp_path, "x", lambda line: None))
        except LaunchError as error:
            lost.append(error.what)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 5)
    won[0].release()


def test_a_start_is_refused_before_its_processes_where_a_run_of_this_machine_holds_the_folder(tmp_path: Path) -> None:
    held, _ = take(tmp_path)
    before, clock = (tmp_path / NAME).read_text(), Clock()
    with pytest.raises(LaunchError, match="another run saves into this folder"):
        refuse_if_held(tmp_path, clock, clock.pause)
    assert HERE_S <= clock.now <= HERE_S + 1 and (tmp_path / NAME).read_text() == before
    held.release()
    refuse_if_held(tmp_path, clock, clock.pause)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda path: put(path, elsewhere()),
        lambda path: put(path, replace(Holder.here("x"), born=1)),
        lambda path: put(path, replace(Holder.here("x"), leaving=True)),
        lambda path: (path / NAME).write_text("{"),
        lambda path: (path / NAME).mkdir(),
        lambda path: os.mkfifo(path / NAME),
        lambda path: (path / NAME).symlink_to(path / "precious"),
        lambda path: path.rmdir(),
    ],
)
def test_what_only_the_ranks_can_decide_starts_them(make: Callable[[Path], object], tmp_path: Path) -> None:
    folder = tmp_path / "save"
    folder.mkdir()
    make(folder)
    clock = Clock()
    refuse_if_held(folder, clock, clock.pause)
    assert clock.now == 0


def test_the_launcher_refuses_a_second_training_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One message, from the command itself: no rank is started."""
    import deepy

    started: list[Any] = []
    monkeypatch.setattr(deepy, "run_job", lambda job, *more: (started.append(job) or 0, ""))
    monkeypatch.setattr(lock_file, "HERE_S", 0.0)
    save = tmp_path / "save"
    config = str(write_run(tmp_path / "data", train_iters=1, train_batch_size=2, run_dir=str(tmp_path / "run"), save=str(save)))
    held, _ = take(save)
    for words in ([], ["--set", "model_parallel_size=2"]):
        with pytest.raises(LaunchError, match="another run saves into this folder"):
            deepy.main([str(ROOT / "train.py"), config, *words])
    assert started == [] and not (tmp_path / "run").exists()
    assert deepy.main([str(ROOT / "eval.py"), config]) == 0
    assert deepy.main([str(ROOT / "train.py"), config, "--dry-run"]) == 0
    held.release()
    assert deepy.main([str(ROOT / "train.py"), config]) == 0
    assert len(started) == 3 and capfd.readouterr().err == ""


@pytest.mark.parametrize("make", [lambda path: path.write_text(""), lambda path: (path.mkdir(), (path / NAME).mkdir())])
def test_a_folder_that_cannot_be_written_is_named(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "save")
    with pytest.raises(CheckpointError, match="the save folder cannot be written") as refused:
        take(tmp_path / "save")
    assert refused.value.where == str(tmp_path / "save")


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / NAME).symlink_to(tmp_path / "precious")
    with pytest.raises(CheckpointError):
        take(tmp_path)
    assert not (tmp_path / "precious").exists()


def test_without_flock_the_file_alone_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock_file.fcntl, "flock", refuse)
    held, _ = take(tmp_path)
    with pytest.raises(LaunchError):
        take(tmp_path)
    held.release()
    assert os.listdir(tmp_path) == []


def test_a_second_run_touches_nothing_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train.py` in this process: refused before its run folder is made, let in when the first has ended."""
    import train

    monkeypatch.setattr(lock_file, "HERE_S", 0.0)
    save = tmp_path / "save"
    config = str(write_run(tmp_path / "data", train_iters=1, train_batch_size=2, run_dir=str(tmp_path / "run"), save=str(save)))
    first, _ = take(save)
    with pytest.raises(LaunchError, match="another run saves into this folder"):
        train.main([config])
    assert not (tmp_path / "run").exists()
    first.release()
    assert train.main([config]) == 0
    assert sorted(os.listdir(save)) == ["global_step1", "latest"], "it has given the folder back"
