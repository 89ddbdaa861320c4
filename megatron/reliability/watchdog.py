"""Watchdog: detects hung and lost ranks within twice the timeout, reports phase and stack, and ends all ranks with a code.

Each rank has a thread that sends a small datagram to all others several times per timeout: what its training thread is
doing, for how long, and where in the code. It needs neither a collective nor the training thread, so it works while both are
stuck. A stopped process is detected by its silence; its last heartbeat has its phase and stack. Datagrams are used because a
stopped peer must not block the sender. A rank from which nothing ever arrived (a firewall) raises no alarm.
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
    """Another rank is lost, so this one cannot continue."""

    exit_code = EXIT_LOST


def describe_stack(thread_id: int) -> tuple[str, ...]:
    """The innermost frames of a thread of this process, innermost first: `loop.py:120 step`."""
    frame = sys._current_frames().get(thread_id)
    if frame is None:
        return ()
    # Not `traceback.extract_stack`, which reads and caches the source of every file on the stack.
    frames = itertools.islice(traceback.walk_stack(frame), _FRAMES)
    return tuple(f"{os.path.basename(f.f_code.co_filename)}:{line} {f.f_code.co_name}" for f, line in frames)


def _collective_of(stack: Sequence[str]) -> str:
    """The collective that the innermost frames wait in; empty outside of one."""
    names = [frame.rpartition(" ")[2] for frame in stack[:3] if frame.startswith("distributed_c10d.py:")]
    return names[-1] if names else ""


class Watchdog:
    """Created by `open` on every rank; `move` reports the training thread's progress; `close` stops it.

    Args:
        timeout_s: seconds without progress before an alarm.
        rank: this rank.
        peers: rank -> address of the others.
        link: bound UDP socket.
        key: of the job; datagrams with another key are ignored.
        leave: called by an alarm with the exit code, after the report is on stderr; the default exits without cleanup, because
            the training thread cannot be interrupted.
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
        self._leave, self._membership = leave, Membership(timeout_s, len(peers) + 1)
        self._thread_id = self._training_thread = threading.get_ident()
        self._phase, self._moves, self._moved_at = "start", 0, time.monotonic()
        self._step, self._settled, self._ended, self._code, self._report = 0, False, "", 0, ""
        self._closing = threading.Event()
        self._every = min(timeout_s / _BEATS_PER_TIMEOUT, _LONGEST_PAUSE_S)
        self._link.settimeout(self._every)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @classmethod
    def open(cls, timeout_s: float, rank: int, consensus: Consensus, leave: Callable[[int], Any] = os._exit) -> Watchdog:
        """Exchange addresses and start; every rank calls this at the same point, in its training thread."""
        link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        host = "127.0.0.1" if consensus.alone else _own_address()
        link.bind(("" if not consensus.alone else host, 0))
        numbers = [int(byte) for byte in host.split(".")]
        rows = consensus.gather([*numbers, link.getsockname()[1], secrets.randbits(62)])
        peers = {r: (".".join(map(str, row[:4])), row[4]) for r, row in enumerate(rows) if r != rank}
        return cls(timeout_s, rank, peers, link, f"{rows[0][5]:x}", leave)

    def move(self, phase: str, step: int | None = None) -> None:
        """Report that the training thread enters `phase` of step `step`."""
        self._step = self._step if step is None else step
        self._phase, self._moved_at, self._moves = phase, time.monotonic(), self._moves + 1

    def follow(self, thread_id: int | None) -> None:
        """Report the stack of another thread that the training thread waits for; None is the training thread itself."""
        self._thread_id = thread_id or self._training_thread

    def settle(self) -> None:
        """Report that the first step is done: from now on the timeout is not multiplied."""
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
            except OSError:  # a peer that has gone is detected by its silence
                continue
        self._membership.receive(beat, time.monotonic())
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
                self._membership.receive(beat, time.monotonic())

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
            # After a pause of this process itself (SIGSTOP, a frozen machine) all others look silent: receive first.
            alarm = self._membership.alarm(now) if now - last < self.timeout_s / 2 else None
            last = now
            if alarm is not None and not self._closing.is_set():
                self._end(alarm)
                return

    def _warn(self) -> None:
        if absent := self.unheard():
            ranks = ", ".join(map(str, absent[:8])) + (", ..." if len(absent) > 8 else "")
            _write(f"watchdog of rank {self.rank}: no heartbeat from rank {ranks}: is UDP between the hosts blocked?\n")

    def _end(self, alarm: Alarm) -> None:
        code = EXIT_LOST if alarm.lost else EXIT_HANG
        self._ended, self._code, self._report = "another rank is lost or hangs", code, alarm.text
        text = f"watchdog of rank {self.rank}, hang_timeout {self.timeout_s:g} s: {alarm.text}\nleaving with code {code}\n"
        _write(text)
        self._send()  # so that the others report the same alarm
        self._leave(code)

    def explain(self, error: Exception) -> LostRank | None:
        """Find the lost rank after a collective failed; None if all others still send heartbeats.

        Connections break as soon as a process dies, long before its silence exceeds the timeout. Errors that are not about
        connections are not examined.
        """
        if not self._peers or not (isinstance(error, LostRank) or any(word in str(error) for word in _BROKEN)):
            return None
        patience = 3 * self._every
        deadline = time.monotonic() + 2 * patience
        while time.monotonic() < deadline:
            now = time.monotonic()
            gone = [rank for rank in self._membership.missing(now, patience) if rank != self.rank]
            if gone:
                beat = self._membership.facts()[gone[0]]
                stack = "".join(f"\n    {frame}" for frame in beat.stack)
                return LostRank(
                    f"rank {gone[0]} is lost, this one cannot go on",
                    where=self._membership.line(gone[0], now) + stack,
                    why=str(error).splitlines()[0] if str(error) else type(error).__name__,
                    hint="start the same command again: it resumes from the last checkpoint",
                )
            time.sleep(self._every / 4)
        return None

    def close(self, ended: str = "finished", code: int = 0) -> None:
        """Send a last heartbeat, so that the others do not take the silence for a loss.

        Args:
            ended: how this rank ends.
            code: its exit code.
        """
        self._ended, self._code = ended, code
        if not self._closing.is_set():
            self._send()
            self._closing.set()
            self._link.close()

    def unheard(self) -> list[int]:
        """Ranks without any heartbeat, for a warning."""
        return sorted(set(self._peers) - set(self._membership.facts()))


def _write(text: str) -> None:
    """Write to stderr unbuffered: the training thread may hold the buffer's lock."""
    os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, text.encode())


def _own_address() -> str:
    """The IPv4 address of this host towards rank 0; loopback if rank 0 is on this host."""
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
