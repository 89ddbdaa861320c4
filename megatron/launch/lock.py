"""One run per save folder: `<save>/run.lock` names the run that holds it, and a second start is refused by that name.

A lock must never outlive its run, for a scheduler starts a killed run again at once, perhaps on another host. So the file is a
claim and not a lock of the kernel: whoever reads it on the same machine asks the process table, whoever reads it elsewhere
waits for the next heartbeat, a number that the holder counts up. Numbers are compared, not clocks. flock() guards the moment of
reading and writing only; where a file system has none, the next heartbeat shows who came second, and that run leaves.
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
SILENT_S = 30.0  # without a heartbeat for so long a run elsewhere has ended
HERE_S = 2.0  # a process of this machine that still runs after so long is not about to end
LEAVING_S = 600.0  # a run that was asked to leave may save first
_GUARD_S = 5.0
_LOOK_S = 0.25
_LONGEST = 16_384
# A process that is dying holds its number still: it is on its way out (PF_EXITING of the kernel), or SIGKILL waits for it.
_EXITING, _KILLED = 0x4, 1 << (signal.SIGKILL - 1)


@dataclass(frozen=True)
class Holder:
    """Who holds a folder. boot, space: the kernel and its process numbers; born: start of the process in clock ticks.

    since: when the run started, for people. beat: counts up while it lives. leaving: it was asked to end and saves.
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
        """What a lock file says; None for an empty one and for anything else."""
        try:
            holder = cls(**json.loads(text))
        except (ValueError, TypeError, RecursionError):
            return None
        kinds = {"str": str, "int": int, "bool": bool}
        right = all(type(getattr(holder, n)) is kinds[str(t)] for n, t in cls.__annotations__.items())
        return holder if right else None

    def lives(self) -> bool | None:
        """Whether its process runs; None where that cannot be seen from here."""
        machine = _machine()
        if not all(machine) or machine != (self.boot, self.space):
            return None
        process = _process(self.pid)
        return process is not None and process[0] == self.born

    def ends(self) -> bool:
        """Whether it is about to end by itself."""
        process = _process(self.pid) if self.lives() else None
        return self.leaving or (process is not None and process[1])


def _machine() -> tuple[str, str]:
    """(this boot of this kernel, its space of process numbers); empty words where there is no /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return "", ""


def _process(pid: int) -> tuple[int, bool] | None:
    """(start in clock ticks, whether it is dying) of a process; None when there is none or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        signals = re.findall(r"(?m)^S(?:ig|hd)Pnd:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(errors="replace"))
        dying = int(fields[6]) & _EXITING or any(int(word, 16) & _KILLED for word in signals)
        return None if fields[0] in "ZX" else (int(fields[19]), bool(dying))
    except (OSError, ValueError, IndexError):
        return None


@contextlib.contextmanager
def _guarded(path: Path) -> Iterator[int]:
    """The open lock file, alone with it as far as the file system can say so."""
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
        # Whoever ended meanwhile took the file away: this one is nobody's.
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
    """Looks at what a lock file says, again and again; `look` is True when the folder is free."""

    def __init__(self, folder: Path, say: Callable[[str], object], clock: Callable[[], float]) -> None:
        self._folder, self._say, self._clock, self._begin = folder, say, clock, clock()
        self._text, self._changed_at, self._beats, self._said = "", clock(), 0, False

    def look(self, text: str) -> bool:
        """One look.

        Raises:
            LaunchError: another run holds the folder and goes on.
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
            self._say(
                f"{self._folder / NAME}: nothing was heard of {_named(holder)} for {SILENT_S:g} s; its folder is taken over"
            )
            return True
        goes_on = False
        if holder is not None:
            goes_on = now - self._begin >= HERE_S if lives else self._beats > 0
            if goes_on and (not holder.ends() or now - self._begin >= LEAVING_S):
                raise _in_use(self._folder, holder)
        if not self._said and (lives is None or goes_on):
            self._said = True
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
    """A folder that this process holds until `release`. Made by `take`."""

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
        """Hold `folder`, which is made when it is missing; of several processes of a run one does this.

        Args:
            command: of this run, for the message to a second one. say: for a line while it must be found out whether the
                holder lives. leaving: whether this run was asked to end. lost: called with an exit code when another run has
                taken the folder over while this one stood still.

        Raises:
            LaunchError: another run holds the folder. CheckpointError: the folder cannot be written.
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
            with contextlib.suppress(OSError):  # a full disk ends no run
                self.beat()

    def beat(self) -> None:
        """Count up; who finds another run in the file leaves at once."""
        with _guarded(self.path) as file:
            now = Holder.of(_read(file))
            if now is None or now.key == self._holder.key:
                self._holder = replace(self._holder, beat=self._holder.beat + 1, leaving=bool(self._leaving()))
                _write(file, self._holder)
                return
        text = f"error: {self.path} was taken over by {_named(now)}, while this run stood still: leaving\n"
        with contextlib.suppress(OSError):
            os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, text.encode())
        self._lost(LaunchError.exit_code)

    def release(self) -> None:
        """Give the folder back."""
        self._end.set()
        self._thread.join(BEAT_S)
        with contextlib.suppress(OSError), _guarded(self.path) as file:
            now = Holder.of(_read(file))
            if now is None or now.key == self._holder.key:
                os.unlink(self.path)
