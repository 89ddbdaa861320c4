"""Heartbeats, the membership table built from them, and the decision which ranks hang or are lost. Pure: callers pass the time.

A rank is *silent* if no heartbeat has arrived for the timeout (its process is stopped or dead, or its machine unreachable), and
*stuck* if heartbeats arrive but its training thread has not progressed for that long. In a hang nearly all ranks are stuck,
waiting in a collective for the one that never joined: the culprits are the silent ranks, else those that progressed least.
Until its first step is done a rank gets `START_FACTOR` times as long, for kernel compilation and connections.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron.files import parse_json

START_FACTOR = 10.0
# Exit codes of ranks that stop because of another rank: one that hangs, one that is lost.
EXIT_HANG, EXIT_LOST = 21, 22
_LONGEST_REPORT = 8000  # fits into a datagram with the rest of a heartbeat
IN_COLLECTIVE = "in the collective"


@dataclass(frozen=True)
class Heartbeat:
    """One message of a rank.

    Attributes:
        rank: the sender.
        phase: what its training thread is doing.
        moves: how often its training thread has reported progress.
        still_s: seconds since the last progress.
        step: the step it works on.
        settled: its first step is done.
        stack: its innermost Python frames, innermost first.
        host: its host name.
        pid: its process id.
        ended: how it ended; empty while it runs.
        code: its exit code when it has ended.
        report: the alarm that ended it, so that all ranks report the same.
    """

    rank: int
    phase: str
    moves: int
    still_s: float
    step: int = 0
    settled: bool = False
    stack: tuple[str, ...] = ()
    host: str = ""
    pid: int = 0
    ended: str = ""
    code: int = 0
    report: str = ""

    def encode(self, key: str) -> bytes:
        """Encode as a datagram of the job `key`."""
        return json.dumps({"job": key, **asdict(self)}).encode()

    @classmethod
    def decode(cls, data: bytes, key: str) -> Heartbeat | None:
        """Inverse of `encode`; None for any other datagram."""
        try:
            values = parse_json(data)
            if values.pop("job") != key:
                return None
            return cls(**{**values, "stack": tuple(values["stack"])})
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


@dataclass(frozen=True)
class Alarm:
    """Why the run ends.

    Attributes:
        lost: a process is gone or silent; False if a rank is stuck.
        culprits: ranks, the likely cause first.
        text: the report.
    """

    lost: bool
    culprits: tuple[int, ...]
    text: str


@dataclass
class _Member:
    beat: Heartbeat
    received: float


@dataclass
class Membership:
    """The last heartbeat of every rank.

    Attributes:
        timeout_s: see the module.
        world: number of ranks, this one included.
    """

    timeout_s: float
    world: int
    _known: dict[int, _Member] = field(default_factory=dict)

    def receive(self, beat: Heartbeat, now: float) -> None:
        """Record a heartbeat that arrived at `now`; older ones are dropped, because datagrams can be reordered."""
        known = self._known.get(beat.rank)
        if known is None or beat.ended or (not known.beat.ended and beat.moves >= known.beat.moves):
            self._known[beat.rank] = _Member(beat, now)

    def _patience(self, beat: Heartbeat) -> float:
        return self.timeout_s if beat.settled else START_FACTOR * self.timeout_s

    def _silent_s(self, known: _Member, now: float) -> float:
        return 0.0 if known.beat.ended else now - known.received

    def missing(self, now: float, patience: float) -> list[int]:
        """Ranks that failed or sent no heartbeat for `patience` seconds, the longest silent first."""
        silent_ranks = []
        for rank, known in self._known.items():
            silent = self._silent_s(known, now)
            if silent > patience or _failed(known.beat):
                silent_ranks.append((known.received, rank))
        return [rank for _, rank in sorted(silent_ranks)]

    def alarm(self, now: float) -> Alarm | None:
        """The alarm at `now`, or the one that another rank has sent; None if no rank hangs or is lost."""
        for known in self._known.values():
            if known.beat.report:
                return Alarm(known.beat.code == EXIT_LOST, (), known.beat.report)
        stuck = [k.beat for k in self._known.values() if self._still_s(k, now) > self._patience(k.beat) and not k.beat.ended]
        failed = [k for k in self._known.values() if _failed(k.beat)]
        if not stuck and not failed:
            return None
        # Half the timeout: the others have waited for a lost rank at least since its last heartbeat.
        silent = self.missing(now, self.timeout_s / 2)
        if silent:
            return Alarm(True, tuple(silent), self._report("lost", silent, now))
        # Of the ranks with the least progress, those in a collective wait for those that are not.
        order = sorted((beat.moves, IN_COLLECTIVE in beat.phase, beat.rank) for beat in stuck)
        culprits = [rank for *key, rank in order if key == list(order[0][:2])]
        return Alarm(False, tuple(culprits), self._report("stuck", culprits, now))

    def _still_s(self, known: _Member, now: float) -> float:
        return known.beat.still_s + self._silent_s(known, now)

    def _report(self, word: str, culprits: list[int], now: float) -> str:
        lines = [f"{word}: rank " + ", ".join(map(str, culprits))]
        for rank in sorted(self._known, key=lambda r: (r not in culprits, r)):
            lines.append(self.line(rank, now))
            if rank in culprits:
                lines += [f"    {frame}" for frame in self._known[rank].beat.stack]
        absent = [str(r) for r in range(self.world) if r not in self._known]
        if absent:
            lines.append("no heartbeat ever from: rank " + ", ".join(absent))
        return "\n".join(lines)[:_LONGEST_REPORT]

    def line(self, rank: int, now: float) -> str:
        """One rank in one line."""
        known = self._known[rank]
        beat, place = known.beat, f"rank {rank} ({known.beat.host} pid {known.beat.pid})"
        if beat.ended:
            return f"{place}: ended in phase '{beat.phase}' of step {beat.step}: {beat.ended} (exit code {beat.code})"
        still = self._still_s(known, now)
        quiet = self._silent_s(known, now)
        heard = f", its process silent for {quiet:.1f} s" if quiet > self.timeout_s / 2 else ""
        return f"{place}: phase '{beat.phase}' of step {beat.step} for {still:.1f} s{heard}"

    def facts(self) -> Mapping[int, Any]:
        """Rank -> its last heartbeat."""
        return {rank: known.beat for rank, known in self._known.items()}


def _failed(beat: Heartbeat) -> bool:
    """Whether a rank ended by its own fault, not because of another rank."""
    return bool(beat.ended) and beat.code not in (0, EXIT_HANG, EXIT_LOST)
