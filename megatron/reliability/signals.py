"""Signals and the time limit: noticed at once on one rank, handled by all ranks at the same step (`stop.py`).

A Python signal handler only runs between two bytecode instructions of the main thread, which may be in a collective for
minutes. So a separate thread reads the signal numbers from the descriptor that the interpreter's C handler writes to. The first
signal is kept for the next consensus; a second one exits at once with 128 + its number, as shells report it. Signals within
`ECHO_S` of the first are the same request: a terminal sends Ctrl-C to every process, and launchers forward it too.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from megatron.errors import ConfigError

ECHO_S = 1.0
DEFAULT_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")


def signal_numbers(names: Sequence[str]) -> tuple[int, ...]:
    """Parse signal names: `SIGTERM`, `TERM` or `15` is 15.

    Raises:
        ConfigError: there is no such signal, or no process can handle it.
    """
    numbers = []
    for name in names:
        word = str(name).upper()
        number = getattr(signal, word if word.startswith("SIG") else f"SIG{word}", None)
        number = int(word) if word.isdecimal() else number
        if number is None or number in (signal.SIGKILL, signal.SIGSTOP) or number not in signal.valid_signals():
            raise ConfigError(f"exit_signals names '{name}'", why="there is no such signal, or nobody can catch it")
        numbers.append(int(number))
    return tuple(numbers)


def seconds_of(text: str | float | None) -> float | None:
    """A time limit in seconds: `90`, `45:00` (minutes), `3:50:00` or Slurm's `1-06:00:00` (days first).

    Raises:
        ConfigError: another form, or not positive.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)", str(text).strip())
    fields = [float(field or 0) for field in match.groups()] if match else [0.0]
    if match is None or not any(fields):
        raise ConfigError(f"time_limit '{text}' is not a time", hint='"3:50:00" (hours), "45:00" (minutes), or seconds')
    days, hours, minutes, seconds = fields
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


class StopSignals:
    """Catches signals from `start` to `stop`; `received` is the number of the first one, 0 before it.

    Args:
        numbers: the signals.
        leave: called by a second signal with 128 + its number; the default exits without cleanup.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        numbers: Sequence[int],
        leave: Callable[[int], Any] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.numbers, self.received = tuple(numbers), 0
        self._leave, self._clock, self._first_at = leave, clock, 0.0
        self._previous: dict[int, Any] = {}
        self._previous_fd = -1
        self._link: tuple[socket.socket, socket.socket] | None = None

    def start(self) -> StopSignals:
        """Install the handlers; call it in the main thread."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        self._link = reader, writer
        self._previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, _nothing) for number in self.numbers}
        threading.Thread(target=self._read, args=(reader,), name="signals", daemon=True).start()
        return self

    def stop(self) -> None:
        """Restore the previous handlers."""
        if self._link is None:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        for end in self._link:
            end.close()
        self._link = None

    def _read(self, reader: socket.socket) -> None:
        while True:
            try:
                numbers = reader.recv(64)
            except OSError:
                return
            if not numbers:
                return
            for number in numbers:
                self.note(number)

    def note(self, number: int) -> None:
        """Record one signal."""
        if number not in self.numbers:
            return
        now = self._clock()
        if not self.received:
            self._first_at, self.received = now, number
            _say(f"{signal.Signals(number).name} received: saving and leaving after this step; a second signal leaves at once")
        elif now - self._first_at > ECHO_S:
            _say(f"{signal.Signals(number).name} again: leaving at once, nothing more is saved")
            self._leave(128 + number)


def _nothing(number: int, frame: FrameType | None) -> None:
    """Does nothing: the interpreter writes the number to the wakeup descriptor only if a handler is set."""


def _say(text: str) -> None:
    """Write to stderr unbuffered: the main thread may hold the buffer's lock."""
    rank = os.environ.get("RANK", "0")
    with contextlib.suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, f"rank {rank}: {text}\n".encode())


class TimeLimit:
    """Whether the run must stop: `limit_s` after its start, less the time for one more step and a save."""

    def __init__(self, limit_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s, self._clock, self._begin = limit_s, clock, clock()
        self._step_s = self._save_s = 0.0

    def took(self, *, step_s: float = 0.0, save_s: float = 0.0) -> None:
        """Record the duration of a step or a save."""
        self._step_s, self._save_s = step_s or self._step_s, max(self._save_s, save_s)

    def is_up(self) -> bool:
        """Whether another step and a save may not fit into the limit."""
        if self._limit_s is None:
            return False
        return self._clock() - self._begin + 2 * self._step_s + 1.5 * self._save_s >= self._limit_s
