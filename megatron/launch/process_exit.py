"""How a rank exits: together with its launcher when that is killed, and with its own code whatever C++ threads still do.

A gloo worker thread releases a tensor shortly after its collective has returned, and needs the GIL for that. If the
interpreter is already finalizing, CPython (up to 3.13) ends the thread by unwinding C++ frames that must not be unwound:
`terminate called without an active exception`, and a successful run exits with 134, more often on a busy machine.
`destroy_process_group` does not join these threads while anything (such as DeepSpeed) refers to a group. So a command that may
be a rank runs its atexit functions and then exits without finalizing the interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import NoReturn

AT_EXIT_S = 20.0  # limit for functions that libraries have registered with atexit
_PR_SET_PDEATHSIG = 1
# Set by torchrun and by DeepSpeed's launcher: the parent is a launcher, and a killed launcher leaves its ranks running.
_LAUNCHED = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")


def leave(code: int) -> NoReturn:
    """Exit with `code`: atexit functions run, streams are flushed, threads are not joined."""
    timer = threading.Timer(AT_EXIT_S, os._exit, (code,))
    timer.daemon = True
    timer.start()
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, lost, or none at all
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Wrap the body of a command that may be a rank: it dies with its launcher, and the process exits here with its code."""
    if any(name in os.environ for name in _LAUNCHED):
        die_with_parent()
        if os.getppid() == 1 and b"python" not in _command_line(1):
            os._exit(128 + signal.SIGKILL)  # the launcher was killed before `die_with_parent` took effect
    try:
        yield
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        leave(end.code if isinstance(end.code, int) else int(end.code is not None))
    except BaseException:  # a defect: its traceback, as the interpreter would show it
        traceback.print_exc()
        leave(1)
    leave(0)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Let the kernel send signal `number` to this process when its parent dies (Linux only)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))


def _command_line(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b"python"  # unknown: assume it is a launcher
