"""What each rank last said of itself, and the verdict on who is hung or gone: pure, with the time handed in.

A rank is *silent* when nothing was heard of its process for the timeout (stopped, dead, its machine unreachable), and *stuck*
when its process answers but its training thread has not moved for that long. In a hang nearly all ranks are stuck, waiting in a
collective for the one that never came: the culprits are the silent ones, else those that moved the fewest times. Until a
rank has finished its first step it is given `START_FACTOR` times as long: kernels are compiled and connections made then.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron.files import parse_json

START_FACTOR = 10.0
# Codes of those that leave because of another rank: one that hangs, one that is lost.
EXIT_HANG, EXIT_LOST = 21, 22
_LONGEST_REPORT = 8000  # fits a datagram with the rest of a beat
IN_COLLECTIVE = "in the collective"


@dataclass(frozen=True)
class Heartbeat:
    """One message of a rank. moves: how often its training thread has said where it is; still_s: since the last time.

    stack: its innermost Python frames, the last one first. ended: how it left, empty while it runs; code: its exit code then;
    report: the alarm that made it leave, so that all ranks say the same.
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
        """As a datagram of the job `key`."""
        return json.dumps({"job": key, **asdict(self)}).encode()

    @classmethod
    def decode(cls, data: bytes, key: str) -> Heartbeat | None:
        """Inverse of `encode`; None for anything else that arrives at the port."""
        try:
            values = parse_json(data)
            if values.pop("job") != key:
                return None
            return cls(**{**values, "stack": tuple(values["stack"])})
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


@dataclass(frozen=True)
class Alarm:
    """Why the run ends. lost: a process is gone or silent, else a rank is stuck. culprits: ranks, the likely cause first."""

    lost: bool
    culprits: tuple[int, ...]
    text: str


@dataclass
class _Known:
    beat: Heartbeat
    heard: float


@dataclass
class Membership:
    """All that one rank has heard. timeout_s: see the module; world: number of ranks, own one included."""

    timeout_s: float
    world: int
    _known: dict[int, _Known] = field(default_factory=dict)

    def hear(self, beat: Heartbeat, now: float) -> None:
        """A message came at `now`; one that is older than what is known (datagrams overtake each other) is dropped."""
        known = self._known.get(beat.rank)
        if known is None or beat.ended or (not known.beat.ended and beat.moves >= known.beat.moves):
            self._known[beat.rank] = _Known(beat, now)

    def _patience(self, beat: Heartbeat) -> float:
        return self.timeout_s if beat.settled else START_FACTOR * self.timeout_s

    def _silent_s(self, known: _Known, now: float) -> float:
        return 0.0 if known.beat.ended else now - known.heard

    def missing(self, now: float, patience: float) -> list[int]:
        """Ranks that ended badly by themselves or were not heard of for `patience` seconds, the longest silent first."""
        found = []
        for rank, known in self._known.items():
            silent = self._silent_s(known, now)
            if silent > patience or _failed(known.beat):
                found.append((known.heard, rank))
        return [rank for _, rank in sorted(found)]

    def alarm(self, now: float) -> Alarm | None:
        """The verdict at `now`; None while all is well. A verdict that another rank has told is taken over."""
        for known in self._known.values():
            if known.beat.report:
                return Alarm(known.beat.code == EXIT_LOST, (), known.beat.report)
        stuck = [k.beat for k in self._known.values() if self._still_s(k, now) > self._patience(k.beat) and not k.beat.ended]
        left = [k for k in self._known.values() if _failed(k.beat)]
        if not stuck and not left:
            return None
        silent = self.missing(now, self.timeout_s / 2)  # half: the others wait for it since it fell silent, or earlier
        if silent:
            return Alarm(True, tuple(silent), self._report("lost", silent, now))
        # Of those that moved the fewest times, whoever is in a collective waits for the others.
        order = sorted((beat.moves, IN_COLLECTIVE in beat.phase, beat.rank) for beat in stuck)
        culprits = [rank for *place, rank in order if place == list(order[0][:2])]
        return Alarm(False, tuple(culprits), self._report("stuck", culprits, now))

    def _still_s(self, known: _Known, now: float) -> float:
        return known.beat.still_s + self._silent_s(known, now)

    def _report(self, word: str, culprits: list[int], now: float) -> str:
        lines = [f"{word}: rank " + ", ".join(map(str, culprits))]
        for rank in sorted(self._known, key=lambda r: (r not in culprits, r)):
            lines.append(self.line(rank, now))
            if rank in culprits:
                lines += [f"    {frame}" for frame in self._known[rank].beat.stack]
        absent = [str(r) for r in range(self.world) if r not in self._known]
        if absent:
            lines.append("never heard of: rank " + ", ".join(absent))
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
        """Rank -> its last beat, for tests and for those who want to print more."""
        return {rank: known.beat for rank, known in self._known.items()}


def _failed(beat: Heartbeat) -> bool:
    """Whether a rank ended by a fault of its own, not because of another one."""
    return bool(beat.ended) and beat.code not in (0, EXIT_HANG, EXIT_LOST)
