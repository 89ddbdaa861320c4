"""Signals and the time limit: noticed at once on one rank, acted upon by all at a step they agree on (`stop.py`).

A signal handler written in Python runs only between two Python instructions of the main thread, which may sit in a collective
for minutes. So the numbers are read by a thread of their own, from the descriptor that the interpreter's C handler writes
to. The first signal is kept for the next vote; a second one leaves at once with 128 + its number, as shells report it. Signals
within `ECHO_S` of the first are the same request: a terminal sends Ctrl-C to every process, and launchers pass it on besides.
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
    """`SIGTERM`, `TERM` or `15` -> 15.

    Raises:
        ConfigError: no such signal here, or one that no process can handle.
    """
    found = []
    for name in names:
        word = str(name).upper()
        number = getattr(signal, word if word.startswith("SIG") else f"SIG{word}", None)
        number = int(word) if word.isdecimal() else number
        if number is None or number in (signal.SIGKILL, signal.SIGSTOP) or number not in signal.valid_signals():
            raise ConfigError(f"exit_signals names '{name}'", why="there is no such signal, or nobody can catch it")
        found.append(int(number))
    return tuple(found)


def seconds_of(text: str | float | None) -> float | None:
    """A time limit in seconds: `90`, `45:00` (minutes), `3:50:00` or Slurm's `1-06:00:00` (days first).

    Raises:
        ConfigError: another form, or not positive.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)", str(text).strip())
    parts = [float(part or 0) for part in match.groups()] if match else [0.0]
    if match is None or not any(parts):
        raise ConfigError(f"time_limit '{text}' is not a time", hint='"3:50:00" (hours), "45:00" (minutes), or seconds')
    days, hours, minutes, seconds = parts
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


class StopSignals:
    """Catches the given signals from `start` to `stop`; `received` is the first one's number, 0 before it.

    leave: what a second signal does with 128 + its number; by default the process ends without clean-up.
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
        """Begin; call it in the main thread."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        self._link = reader, writer
        self._previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, _nothing) for number in self.numbers}
        threading.Thread(target=self._read, args=(reader,), name="signals", daemon=True).start()
        return self

    def stop(self) -> None:
        """Put back what was there before."""
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
        """One signal has come."""
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
    """The interpreter writes the number to the descriptor by itself, if a handler is set."""


def _say(text: str) -> None:
    """To stderr, without the interpreter's buffers: the main thread may hold them."""
    rank = os.environ.get("RANK", "0")
    with contextlib.suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, f"rank {rank}: {text}\n".encode())


class TimeLimit:
    """Whether it is time to leave: `limit_s` after `begin`, less what one more step and save take."""

    def __init__(self, limit_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s, self._clock, self._begin = limit_s, clock, clock()
        self._step_s = self._save_s = 0.0

    def took(self, *, step_s: float = 0.0, save_s: float = 0.0) -> None:
        """Remember how long a step or a save lasted."""
        self._step_s, self._save_s = step_s or self._step_s, max(self._save_s, save_s)

    def is_up(self) -> bool:
        """Whether another step and a save may not fit any more."""
        if self._limit_s is None:
            return False
        return self._clock() - self._begin + 2 * self._step_s + 1.5 * self._save_s >= self._limit_s
