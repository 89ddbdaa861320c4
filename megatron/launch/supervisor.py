"""Stands between a launcher and one rank and makes sure that the rank ends: `python supervisor.py train.py ARGS`.

A launcher that dies, or whose connection is cut, leaves remote processes running; a rank that is stopped (SIGSTOP) does not
hear SIGTERM, and DeepSpeed's launcher then waits 30 seconds. The supervisor dies with its launcher and its rank with it (the
kernel sees to both). It watches its standard input (`--watch-stdin`), which stays open as long as the ssh connection or the
`deepy.py` that started it: at its end the rank is asked to leave, and killed when it does not.

`--group` and `--group-at-once` stand between `deepy.py` and a runner of several hosts, in a session of their own: at the end of
standard input the runner is asked to leave and then, or at once, every process of the session is killed. So pdsh does not
outlive a `deepy.py` that was killed, and with its connections all ranks end.

Signals go through; the exit code is the child's, 128 + n for signal n. Standard library only: it costs 15 ms and 10 MB.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from types import FrameType

GRACE_S = 20.0  # from "please leave" to SIGKILL: a rank may finish its step and save
_PR_SET_PDEATHSIG = 1


_OPTIONS = ("--watch-stdin", "--group", "--group-at-once")


def _die_with_parent() -> None:
    """The kernel kills this process when its parent is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _stopped(pid: int) -> bool:
    """Whether the process is stopped by SIGSTOP or a debugger and so cannot hear a signal."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


def _group() -> list[int]:
    """Process ids of this process's group, remains left out."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", encoding="ascii", errors="replace") as file:
                state, _, group = file.read().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(group) == os.getpgrp() and state not in "ZX":
            found.append(int(name))
    return found


class Supervisor:
    """One child and its end. option: of the command line, empty without one."""

    def __init__(self, command: list[str], option: str = "") -> None:
        self._option, self._ending = option if option.startswith("--group") else "", threading.Event()
        # Signals that come before the child is there must not be lost: they are held until it is.
        self.child: subprocess.Popen[bytes] | None = None
        self._asked: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, self._forward)
        self.child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
        for waiting in self._asked:
            self.ask(waiting)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self.child is None:
            self._asked.append(number)
        else:
            self.ask(number)

    def ask(self, number: int) -> None:
        """Send a signal to the child; a stopped one is killed, it could not hear."""
        assert self.child is not None
        if self.child.poll() is None:
            fatal = number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
            self.child.send_signal(signal.SIGKILL if fatal and _stopped(self.child.pid) else number)

    def watch_stdin(self) -> None:
        """Wait for the end of standard input, then end the child (its own thread)."""
        while os.read(0, 4096):
            pass
        assert self.child is not None
        if self._option:
            self._end_group()
        if self.child.poll() is None:
            sys.stderr.write(f"supervisor of pid {self.child.pid}: the launcher is gone, it is asked to leave\n")
        self.ask(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and self.child.poll() is None:
            time.sleep(0.1)
            if _stopped(self.child.pid):
                break
        if self.child.poll() is None:
            self.child.kill()

    def _end_group(self) -> None:
        """Ask every process of this group to end, unless it must be at once; then kill them, this one included."""
        self._ending.set()
        if self._option == "--group":
            os.killpg(0, signal.SIGTERM)
            deadline = time.monotonic() + GRACE_S
            while time.monotonic() < deadline and _group() != [os.getpid()]:
                time.sleep(0.1)
        os.killpg(0, signal.SIGKILL)

    def wait(self) -> int:
        """The exit code of the child."""
        assert self.child is not None
        code = self.child.wait()
        if self._ending.is_set():  # the child was the first of its group to go
            time.sleep(2 * GRACE_S)
        return code if code >= 0 else 128 - code


def main(arguments: list[str]) -> int:
    """`[OPTION] SCRIPT ARGS`: run the script."""
    option = arguments[0] if arguments[:1] and arguments[0] in _OPTIONS else ""
    if option in ("", "--watch-stdin"):
        _die_with_parent()
    supervisor = Supervisor([sys.executable, "-u", *arguments[bool(option) :]], option)
    if option:
        threading.Thread(target=supervisor.watch_stdin, daemon=True).start()
    code = supervisor.wait()
    if option == "--watch-stdin":  # the launching command counts these: pdsh that is killed makes DeepSpeed's runner end with 0
        os.write(2, f"supervisor: rank {os.environ.get('RANK', '0')} ended with {code}\n".encode())
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
