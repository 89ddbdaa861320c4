"""One run per save folder: `<save>/run.lock` names the run that holds it, and a second run is refused with that name.

A lock must never outlive its run, because a scheduler restarts a killed run at once, perhaps on another host. So the file is a
claim, not a kernel lock: a reader on the same machine looks into the process table, a reader elsewhere waits for the next
heartbeat, a counter that the holder increments. Counters are compared, not clocks. flock() only protects each read and write;
where the file system has no flock(), the next heartbeat shows which run came second, and that one exits.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron.errors import CheckpointError, LaunchError

NAME = "run.lock"
BEAT_S = 5.0
SILENT_S = 30.0  # a run on another machine without a heartbeat for this long has ended
HERE_S = 2.0  # a process of this machine that still runs after this long is not about to end
LEAVING_S = 600.0  # a run that was asked to stop may save first
_GUARD_S = 5.0
_LOOK_S = 0.25
_LONGEST = 16_384
# A dying process still has its pid: the kernel has set PF_EXITING, or SIGKILL is pending.
_EXITING, _KILLED = 0x4, 1 << (signal.SIGKILL - 1)


@dataclass(frozen=True)
class Holder:
    """The run that holds a folder.

    Attributes:
        key: unique id of this holder.
        host: host name.
        boot: boot id of the kernel.
        space: its pid namespace.
        pid: process id.
        born: start of the process in clock ticks, because pids are reused.
        since: when the run started, for messages.
        command: of the run, for messages.
        beat: heartbeat counter.
        leaving: the run was asked to stop and is saving.
    """

    key: str
    host: str
    boot: str
    space: str
    pid: int
    born: int
    since: str
    command: str
    beat: int = 0
    leaving: bool = False

    @classmethod
    def here(cls, command: str) -> Holder:
        """This process."""
        pid, since = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S")
        born = (_process(pid) or (0, True))[0]
        return cls(secrets.token_hex(8), socket.gethostname(), *_machine(), pid, born, since, command)

    @classmethod
    def of(cls, text: str) -> Holder | None:
        """Parse a lock file; None if it is empty or invalid."""
        try:
            holder = cls(**json.loads(text))
        except (ValueError, TypeError, RecursionError):
            return None
        kinds = {"str": str, "int": int, "bool": bool}
        valid = all(type(getattr(holder, n)) is kinds[str(t)] for n, t in cls.__annotations__.items())
        return holder if valid else None

    def lives(self) -> bool | None:
        """Whether its process runs; None if that cannot be seen from this machine."""
        machine = _machine()
        if not all(machine) or machine != (self.boot, self.space):
            return None
        process = _process(self.pid)
        return process is not None and process[0] == self.born

    def ends(self) -> bool:
        """Whether it is about to end."""
        process = _process(self.pid) if self.lives() else None
        return self.leaving or (process is not None and process[1])


def _machine() -> tuple[str, str]:
    """(boot id of the kernel, pid namespace); empty strings without /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return "", ""


def _process(pid: int) -> tuple[int, bool] | None:
    """(start in clock ticks, whether it is dying) of a process; None if it does not exist or is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        signals = re.findall(r"(?m)^S(?:ig|hd)Pnd:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(errors="replace"))
        dying = int(fields[6]) & _EXITING or any(int(word, 16) & _KILLED for word in signals)
        return None if fields[0] in "ZX" else (int(fields[19]), bool(dying))
    except (OSError, ValueError, IndexError):
        return None


@contextlib.contextmanager
def _guarded(path: Path) -> Iterator[int]:
    """Open the lock file with an exclusive flock(), where the file system has one."""
    deadline = time.monotonic() + _GUARD_S
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES) and time.monotonic() < deadline:
                os.close(file)
                time.sleep(0.01)
                continue
        # A run that has released the folder meanwhile has unlinked the file: only the inode at `path` counts.
        with contextlib.suppress(OSError):
            if os.fstat(file).st_ino == os.stat(path).st_ino:
                break
        os.close(file)
    try:
        yield file
    finally:
        os.close(file)


def _read(file: int) -> str:
    return os.pread(file, _LONGEST, 0).decode(errors="replace")


def _write(file: int, holder: Holder) -> None:
    data = json.dumps(asdict(holder)).encode()
    os.pwrite(file, data, 0)
    os.ftruncate(file, len(data))


class _Judge:
    """Decides from repeated reads of a lock file whether the folder is free."""

    def __init__(self, folder: Path, say: Callable[[str], object], clock: Callable[[], float]) -> None:
        self._folder, self._say, self._clock, self._begin = folder, say, clock, clock()
        self._text, self._changed_at, self._beats, self._announced = "", clock(), 0, False

    def look(self, text: str) -> bool:
        """Whether the folder is free, from one more read of the file.

        Raises:
            LaunchError: another run holds the folder and is not about to end.
        """
        if not text.strip():
            return True
        now, holder = self._clock(), Holder.of(text)
        if text != self._text:
            self._beats += bool(self._text)
            self._text, self._changed_at = text, now
        lives = holder.lives() if holder else None
        if lives is False:
            return True
        if lives is None and now - self._changed_at >= SILENT_S:
            self._say(f"{self._folder / NAME}: no heartbeat from {_named(holder)} for {SILENT_S:g} s; its folder is taken over")
            return True
        alive = False
        if holder is not None:
            alive = now - self._begin >= HERE_S if lives else self._beats > 0
            if alive and (not holder.ends() or now - self._begin >= LEAVING_S):
                raise _in_use(self._folder, holder)
        if not self._announced and (lives is None or alive):
            self._announced = True
            wait = "its end" if holder and holder.ends() else f"a sign of life, at most {SILENT_S:g} s"
            self._say(f"{self._folder} is held by {_named(holder)}: waiting for {wait}")
        return False


def _named(holder: Holder | None) -> str:
    if holder is None:
        return "a run that cannot be read"
    return f"the run with pid {holder.pid} on {holder.host}, started {holder.since}"


def _in_use(folder: Path, holder: Holder) -> LaunchError:
    return LaunchError(
        "another run saves into this folder",
        where=str(folder),
        why=f"{_named(holder)}, is alive: {holder.command[:200]}",
        hint=f"wait for its end, stop it (kill {holder.pid} on {holder.host}), or give this run its own folder: --set save=...",
    )


def refuse_if_held(
    folder: str | Path, clock: Callable[[], float] = time.monotonic, pause: Callable[[float], object] = time.sleep
) -> None:
    """Refuse a start whose save folder a living run of this machine holds, before any of its processes is started.

    Changes nothing. Whatever cannot be decided at once, a run elsewhere or one that is leaving, is left to `FolderLock.take`.

    Raises:
        LaunchError: another run holds the folder and goes on.
    """
    begin = clock()
    while True:
        try:
            file = os.open(Path(folder) / NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return
        try:
            holder = Holder.of(_read(file))
        except OSError:  # a directory, a pipe
            return
        finally:
            os.close(file)
        if holder is None or not holder.lives() or holder.ends():
            return
        if clock() - begin >= HERE_S:
            raise _in_use(Path(folder), holder)
        pause(_LOOK_S)


class FolderLock:
    """A folder that this process holds until `release`; created by `take`."""

    def __init__(self, folder: Path, holder: Holder, leaving: Callable[[], bool], lost: Callable[[int], Any]) -> None:
        self.path, self._holder, self._leaving, self._lost = folder / NAME, holder, leaving, lost
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._live, name="folder lock", daemon=True)
        self._thread.start()

    @classmethod
    def take(
        cls,
        folder: str | Path,
        command: str,
        say: Callable[[str], object],
        leaving: Callable[[], bool] = lambda: False,
        lost: Callable[[int], Any] = os._exit,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], object] = time.sleep,
    ) -> FolderLock:
        """Take `folder`, creating it if it is missing; only one process of a run does this.

        Args:
            folder: the save folder.
            command: of this run, for the message to a second run.
            say: called with a line while this run waits to learn whether the holder is alive.
            leaving: whether this run was asked to stop.
            lost: called with an exit code if another run has taken the folder over while this one was suspended.
            clock: seconds, monotonic.
            pause: sleeps for some seconds.

        Raises:
            LaunchError: another run holds the folder.
            CheckpointError: the folder is not writable.
        """
        folder, holder = Path(folder), Holder.here(command)
        judge = _Judge(folder, say, clock)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            while True:
                with _guarded(folder / NAME) as file:
                    if judge.look(_read(file)):
                        _write(file, holder)
                        return cls(folder, holder, leaving, lost)
                pause(_LOOK_S)
        except OSError as error:
            raise CheckpointError(
                "the save folder cannot be written", where=str(folder), why=str(error), hint="correct `save`"
            ) from error

    def _live(self) -> None:
        last = time.monotonic()
        while not self._end.wait(_LOOK_S):
            if time.monotonic() - last < BEAT_S and self._leaving() == self._holder.leaving:
                continue
            last = time.monotonic()
            with contextlib.suppress(OSError):  # a full disk must not end the run
                self.beat()

    def beat(self) -> None:
        """Increment the counter; if another run is in the file, this one exits at once."""
        with _guarded(self.path) as file:
            current = Holder.of(_read(file))
            if current is None or current.key == self._holder.key:
                self._holder = replace(self._holder, beat=self._holder.beat + 1, leaving=bool(self._leaving()))
                _write(file, self._holder)
                return
        text = f"error: {self.path} was taken over by {_named(current)} while this run was suspended: leaving\n"
        with contextlib.suppress(OSError):
            os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, text.encode())
        self._lost(LaunchError.exit_code)

    def release(self) -> None:
        """Release the folder."""
        self._end.set()
        self._thread.join(BEAT_S)
        with contextlib.suppress(OSError), _guarded(self.path) as file:
            current = Holder.of(_read(file))
            if current is None or current.key == self._holder.key:
                os.unlink(self.path)
