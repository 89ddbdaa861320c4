"""How a process of a job ends: with its launcher when that is killed, and with its own code whatever C++ threads still do.

A gloo worker thread gives a tensor back a moment after the collective that it served has returned, for which it needs the
interpreter's lock. When the interpreter is already being taken down, CPython (up to 3.13) ends such a thread by unwinding it
through C++ frames that may not be unwound: `terminate called without an active exception`, and a run that has done everything
ends with 134, the more often the busier its machine is. `destroy_process_group` does not join these threads as long as anybody
(DeepSpeed does) refers to a group. So a command that may join others runs what is registered for its end and then leaves the
interpreter standing.
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

AT_EXIT_S = 20.0  # for what libraries have registered with atexit
_PR_SET_PDEATHSIG = 1
# Variables of torchrun and of DeepSpeed's launcher: the parent is a launcher, and one that is killed leaves its ranks running.
_LAUNCHED = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")


def leave(code: int) -> NoReturn:
    """End the process with `code`: registered functions run, streams are flushed, no thread is waited for."""
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
    """Around the body of a command that may be a rank of several: it dies with its launcher, and the process ends here, with
    the code that it would have.
    """
    if any(name in os.environ for name in _LAUNCHED):
        die_with_parent()
        if os.getppid() == 1 and b"python" not in _command_line(1):
            os._exit(128 + signal.SIGKILL)  # the launcher was killed before the line above
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
    """The kernel sends this process `number` when the one that started it dies; nothing where there is no such call."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))


def _command_line(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b"python"  # not known
