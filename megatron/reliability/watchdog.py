"""Hung and lost ranks: found within twice the timeout, named with phase and stack, and everybody leaves with a code.

Each rank has a thread that sends a small datagram to all others several times per timeout: what its training thread is
doing, for how long, and where in the code. It needs neither a collective nor the training thread, so it works while both are
stuck, and a process that is stopped is betrayed by its silence; what it said last names its phase and its stack. Datagrams,
because a peer that is stopped must not block the sender. Who was never heard of (a firewall) raises no alarm.
"""

from __future__ import annotations

import itertools
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from megatron.errors import TrainingError
from megatron.reliability.consensus import Consensus
from megatron.reliability.heartbeat import EXIT_HANG, EXIT_LOST, IN_COLLECTIVE, Alarm, Heartbeat, Membership

_BEATS_PER_TIMEOUT, _LONGEST_PAUSE_S = 8, 5.0
_BROKEN = ("gloo", "NCCL", "Connection", "connection", "Broken pipe", "imed out", "Socket", "TCPStore")
_FRAMES = 12


class LostRank(TrainingError):
    """Another rank is gone, so this one cannot go on."""

    exit_code = EXIT_LOST


def describe_stack(thread_id: int) -> tuple[str, ...]:
    """The innermost frames of a thread of this process, the last one first: `loop.py:120 step`."""
    frame = sys._current_frames().get(thread_id)
    if frame is None:
        return ()
    # Not `traceback.extract_stack`: it reads the source of every file that ever stood on the stack, and keeps it.
    frames = itertools.islice(traceback.walk_stack(frame), _FRAMES)
    return tuple(f"{os.path.basename(f.f_code.co_filename)}:{line} {f.f_code.co_name}" for f, line in frames)


def _collective_of(stack: Sequence[str]) -> str:
    """The collective that the innermost frames wait in, empty outside of one."""
    names = [frame.rpartition(" ")[2] for frame in stack[:3] if frame.startswith("distributed_c10d.py:")]
    return names[-1] if names else ""


class Watchdog:
    """Made by `open`, which every rank calls; `move` says where the training thread is; `close` ends it.

    leave: what an alarm does with the exit code, after the report went to stderr; by default the process ends without clean-up,
    since its training thread cannot be reached.
    """

    def __init__(
        self,
        timeout_s: float,
        rank: int,
        peers: dict[int, tuple[str, int]],
        link: socket.socket,
        key: str,
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        self.timeout_s, self.rank, self._peers, self._link, self._key = timeout_s, rank, peers, link, key
        self._leave, self._roll = leave, Membership(timeout_s, len(peers) + 1)
        self._thread_id = self._training_thread = threading.get_ident()
        self._phase, self._moves, self._moved_at = "start", 0, time.monotonic()
        self._step, self._settled, self._ended, self._code, self._report = 0, False, "", 0, ""
        self._closing = threading.Event()
        self._every = min(timeout_s / _BEATS_PER_TIMEOUT, _LONGEST_PAUSE_S)
        self._link.settimeout(self._every)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @classmethod
    def open(cls, timeout_s: float, rank: int, ballot: Consensus, leave: Callable[[int], Any] = os._exit) -> Watchdog:
        """Tell each other the ports and start; every rank calls this at the same place, in its training thread."""
        link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        host = "127.0.0.1" if ballot.alone else _own_address()
        link.bind(("" if not ballot.alone else host, 0))
        numbers = [int(part) for part in host.split(".")]
        told = ballot.gather([*numbers, link.getsockname()[1], secrets.randbits(62)])
        peers = {r: (".".join(map(str, row[:4])), row[4]) for r, row in enumerate(told) if r != rank}
        return cls(timeout_s, rank, peers, link, f"{told[0][5]:x}", leave)

    def move(self, phase: str, step: int | None = None) -> None:
        """The training thread enters `phase`; `step` is the one it works on."""
        self._step = self._step if step is None else step
        self._phase, self._moved_at, self._moves = phase, time.monotonic(), self._moves + 1

    def follow(self, thread_id: int | None) -> None:
        """Show the stack of another thread that the training thread waits for; None: its own again."""
        self._thread_id = thread_id or self._training_thread

    def settle(self) -> None:
        """The first step is done: from here on the timeout holds as it is."""
        if not self._settled:
            self._settled, self._moved_at, self._moves = True, time.monotonic(), self._moves + 1

    def _beat(self) -> Heartbeat:
        stack = describe_stack(self._thread_id)
        collective = _collective_of(stack)
        phase = f"{self._phase}, {IN_COLLECTIVE} {collective}" if collective else self._phase
        still = time.monotonic() - self._moved_at
        return Heartbeat(
            self.rank,
            phase,
            self._moves,
            still,
            self._step,
            self._settled,
            stack,
            socket.gethostname(),
            os.getpid(),
            self._ended,
            self._code,
            self._report,
        )

    def _send(self) -> Heartbeat:
        beat = self._beat()
        data = beat.encode(self._key)
        for address in self._peers.values():
            try:
                self._link.sendto(data, address)
            except OSError:  # a peer whose port is gone is found by its silence
                continue
        self._roll.hear(beat, time.monotonic())
        return beat

    def _listen(self, until: float) -> None:
        while not self._closing.is_set() and time.monotonic() < until:
            try:
                data = self._link.recv(65536)
            except (TimeoutError, ConnectionError):
                continue
            except OSError:
                return
            beat = Heartbeat.decode(data, self._key)
            if beat is not None:
                self._roll.hear(beat, time.monotonic())

    def _watch(self) -> None:
        begin = last = time.monotonic()
        warned = False
        while not self._closing.is_set():
            self._send()
            self._listen(time.monotonic() + self._every)
            now = time.monotonic()
            if not warned and now - begin > 4 * self._every + 30.0:
                warned = True
                self._warn()
            # A process that was itself stopped (SIGSTOP, a frozen machine) must hear the others again before it judges them.
            alarm = self._roll.alarm(now) if now - last < self.timeout_s / 2 else None
            last = now
            if alarm is not None and not self._closing.is_set():
                self._end(alarm)
                return

    def _warn(self) -> None:
        if absent := self.unheard():
            ranks = ", ".join(map(str, absent[:8])) + (", ..." if len(absent) > 8 else "")
            _write(f"watchdog of rank {self.rank}: nothing was heard of rank {ranks}: is UDP between the hosts blocked?\n")

    def _end(self, alarm: Alarm) -> None:
        code = EXIT_LOST if alarm.lost else EXIT_HANG
        self._ended, self._code, self._report = "another rank is lost or hangs", code, alarm.text
        text = f"watchdog of rank {self.rank}, hang_timeout {self.timeout_s:g} s: {alarm.text}\nleaving with code {code}\n"
        _write(text)
        self._send()  # the others leave with the same words
        self._leave(code)

    def explain(self, error: Exception) -> LostRank | None:
        """After a collective failed: wait until it is known who is gone, and name it; None if all others still answer.

        Connections break at once when a process dies, long before its silence is beyond the timeout. An error that has
        nothing to do with connections is not looked into.
        """
        if not self._peers or not (isinstance(error, LostRank) or any(word in str(error) for word in _BROKEN)):
            return None
        patience = 3 * self._every
        deadline = time.monotonic() + 2 * patience
        while time.monotonic() < deadline:
            now = time.monotonic()
            gone = [rank for rank in self._roll.missing(now, patience) if rank != self.rank]
            if gone:
                beat = self._roll.facts()[gone[0]]
                stack = "".join(f"\n    {frame}" for frame in beat.stack)
                return LostRank(
                    f"rank {gone[0]} is lost, this one cannot go on",
                    where=self._roll.line(gone[0], now) + stack,
                    why=str(error).splitlines()[0] if str(error) else type(error).__name__,
                    hint="start the same command again: it resumes from the last checkpoint",
                )
            time.sleep(self._every / 4)
        return None

    def close(self, ended: str = "finished", code: int = 0) -> None:
        """Say good-bye, so that the silence that follows is understood; code: the exit code of this rank."""
        self._ended, self._code = ended, code
        if not self._closing.is_set():
            self._send()
            self._closing.set()
            self._link.close()

    def unheard(self) -> list[int]:
        """Ranks that nothing has come from, for a warning."""
        return sorted(set(self._peers) - set(self._roll.facts()))


def _write(text: str) -> None:
    """To stderr past the interpreter's buffers, which the training thread may hold."""
    os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, text.encode())


def _own_address() -> str:
    """The IPv4 address that others reach this host at: the one towards rank 0, loopback where it is here."""
    target = os.environ.get("MASTER_ADDR") or "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, 9))  # no packet is sent: this only asks for the route
            address = str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"
    if address.startswith("127.") and not target.startswith("127.") and target != "localhost":
        return socket.gethostbyname(socket.gethostname())
    return address
