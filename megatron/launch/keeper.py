"""Stands between a launcher and one rank and makes sure that the rank ends: `python keeper.py train.py ARGS`.

A launcher that dies, or whose connection is cut, leaves remote processes running; a rank that is stopped (SIGSTOP) does not
hear SIGTERM, and DeepSpeed's launcher then waits 30 seconds. The keeper watches its standard input, which stays open as long
as the ssh connection that started it (`--watch-stdin`): at its end the rank is asked to leave, and killed when it does not.
Signals go through; the exit code is the rank's, 128 + n for signal n. Standard library only: it costs 15 ms and 10 MB.
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


def _die_with_parent() -> None:
    """In the child: the kernel kills it when the keeper is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _stopped(pid: int) -> bool:
    """Whether the process is stopped by SIGSTOP or a debugger and so cannot hear a signal."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


class Keeper:
    """One rank and its end."""

    def __init__(self, command: list[str]) -> None:
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
        """Send a signal to the rank; a stopped one is killed, it could not hear."""
        assert self.child is not None
        if self.child.poll() is None:
            fatal = number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
            self.child.send_signal(signal.SIGKILL if fatal and _stopped(self.child.pid) else number)

    def watch_stdin(self) -> None:
        """Wait for the end of standard input, then end the rank (its own thread)."""
        while os.read(0, 4096):
            pass
        assert self.child is not None
        if self.child.poll() is None:
            sys.stderr.write(f"keeper of pid {self.child.pid}: the launcher is gone, the rank is asked to leave\n")
        self.ask(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and self.child.poll() is None:
            time.sleep(0.1)
            if _stopped(self.child.pid):
                break
        if self.child.poll() is None:
            self.child.kill()

    def wait(self) -> int:
        """The exit code of the rank."""
        assert self.child is not None
        code = self.child.wait()
        return code if code >= 0 else 128 - code


def main(arguments: list[str]) -> int:
    """`[--watch-stdin] SCRIPT ARGS`: run the script as a rank."""
    watch = arguments[:1] == ["--watch-stdin"]
    keeper = Keeper([sys.executable, "-u", *arguments[watch:]])
    if watch:
        threading.Thread(target=keeper.watch_stdin, daemon=True).start()
    code = keeper.wait()
    if watch:  # the launching command counts these: pdsh that is killed makes DeepSpeed's runner end with 0
        os.write(2, f"keeper: rank {os.environ.get('RANK', '0')} ended with {code}\n".encode())
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
