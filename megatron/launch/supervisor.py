"""Runs between a launcher and one rank and makes sure that the rank ends: `python supervisor.py train.py ARGS`.

A launcher that dies, or whose connection breaks, leaves remote processes running; a stopped rank (SIGSTOP) does not receive
SIGTERM, and DeepSpeed's launcher then waits 30 seconds. The supervisor dies with its launcher, and its rank with it (the
kernel takes care of both). It watches its standard input (`--watch-stdin`), which stays open as long as the ssh connection or
the `deepy.py` that started it: at end of file it sends SIGTERM to the rank, and kills it if it does not exit.

`--group` and `--group-at-once` run between `deepy.py` and a runner of several hosts, in a session of their own: at end of file
the runner gets SIGTERM first (or not), then every process of the session is killed. So pdsh does not outlive a killed
`deepy.py`, and when its connections close all ranks end.

Signals are forwarded; the exit code is the child's, 128 + n for signal n. Standard library only: it costs 15 ms and 10 MB.
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

GRACE_S = 20.0  # from SIGTERM to SIGKILL: a rank may finish its step and save
_PR_SET_PDEATHSIG = 1
_OPTIONS = ("--watch-stdin", "--group", "--group-at-once")


def _die_with_parent() -> None:
    """Let the kernel kill this process when its parent dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _stopped(pid: int) -> bool:
    """Whether the process is stopped by SIGSTOP or a debugger, so that it cannot handle a signal."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


def _group() -> list[int]:
    """Process ids of this process's group, without zombies."""
    pids = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", encoding="ascii", errors="replace") as file:
                state, _, group = file.read().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(group) == os.getpgrp() and state not in "ZX":
            pids.append(int(name))
    return pids


class Supervisor:
    """Starts one child and ends it when the launcher is gone.

    Args:
        command: of the child.
        option: one of `_OPTIONS`, or empty.
    """

    def __init__(self, command: list[str], option: str = "") -> None:
        self._option, self._ending = option if option.startswith("--group") else "", threading.Event()
        # Signals that arrive before the child exists must not be lost: they are recorded and sent later.
        self.child: subprocess.Popen[bytes] | None = None
        self._received: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, self._forward)
        self.child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
        for early in self._received:
            self.send(early)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self.child is None:
            self._received.append(number)
        else:
            self.send(number)

    def send(self, number: int) -> None:
        """Send a signal to the child; a stopped child is killed, since it cannot handle the signal."""
        assert self.child is not None
        if self.child.poll() is None:
            fatal = number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
            self.child.send_signal(signal.SIGKILL if fatal and _stopped(self.child.pid) else number)

    def watch_stdin(self) -> None:
        """Wait for the end of standard input, then end the child; runs in its own thread."""
        while os.read(0, 4096):
            pass
        assert self.child is not None
        if self._option:
            self._end_group()
        if self.child.poll() is None:
            sys.stderr.write(f"supervisor of pid {self.child.pid}: the launcher is gone, it is asked to leave\n")
        self.send(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and self.child.poll() is None:
            time.sleep(0.1)
            if _stopped(self.child.pid):
                break
        if self.child.poll() is None:
            self.child.kill()

    def _end_group(self) -> None:
        """Send SIGTERM to this process group (with `--group`), then SIGKILL, this process included."""
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
        if self._ending.is_set():  # the child ended first: stay alive until `_end_group` kills the group
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
    if option == "--watch-stdin":  # `deepy.py` counts these: a killed pdsh makes DeepSpeed's runner exit with 0
        os.write(2, f"supervisor: rank {os.environ.get('RANK', '0')} ended with {code}\n".encode())
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
