"""What may end a run from outside, and the votes by which all ranks end it at the same step.

Once per step, when the next batch has been read, all ranks vote on the CPU (`reliability/consensus.py`): has anyone had a
signal, is the time up, is anyone still waiting for data, did anyone skip the last step? A signal that comes during a step, a
save, an evaluation or a wait for data is thus acted upon by everybody at once: evaluations and waits are given up, a step and a
save are finished first.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from typing import TypeVar

from megatron.data.prefetch import Prefetcher
from megatron.errors import TrainingError
from megatron.reliability.consensus import Consensus
from megatron.reliability.signals import StopSignals, TimeLimit
from megatron.reliability.watchdog import LostRank, Watchdog

# Codes of a process that was asked to leave: with its work saved (start the same command again), or with nothing to save it in.
EXIT_SAVED, EXIT_UNSAVED = 75, 76
T = TypeVar("T")


class Control:
    """Made once per run on every rank; without arguments it watches nothing and votes on nothing.

    consensus: of all ranks. poll_s: how often a rank that waits for data asks whether to leave. close() is the owner's duty.
    """

    def __init__(
        self,
        ballot: Consensus | None = None,
        signals: StopSignals | None = None,
        limit: TimeLimit | None = None,
        watchdog: Watchdog | None = None,
        poll_s: float = 0.5,
    ) -> None:
        self.ballot, self.watchdog = ballot or Consensus(), watchdog
        self._signals, self._limit, self._poll_s = signals, limit, poll_s
        self._votes = signals is not None or limit is not None or not self.ballot.alone
        self._fetcher = Prefetcher()
        self.leaving: str | None = None

    def phase(self, name: str, step: int | None = None) -> None:
        """Where the training thread is, for the watchdog."""
        if self.watchdog is not None:
            self.watchdog.move(name, step)

    def settled(self) -> None:
        """The first step is behind us."""
        if self.watchdog is not None:
            self.watchdog.settle()

    def took(self, *, step_s: float = 0.0, save_s: float = 0.0) -> None:
        """How long a step or a save lasted, for the time limit."""
        if self._limit is not None:
            self._limit.took(step_s=step_s, save_s=save_s)

    def stop_asked(self) -> bool:
        """Vote now on leaving; every rank calls this at the same place."""
        if self._votes:
            self._vote([])
        return self.leaving is not None

    def _vote(self, more: Sequence[int]) -> list[int]:
        """Vote on signal and time, and on `more`; the result of the latter."""
        received = self._signals.received if self._signals is not None else 0
        time_up = self._limit is not None and self._limit.is_up()
        number, up, *rest = self.ballot.reduce_max([received, int(time_up), *more])
        if self.leaving is None and (number or up):
            self.leaving = signal.Signals(number).name if number else "time_limit"
        return rest

    def data(self, read: Callable[[], T], rank: int, skipped: bool) -> T | None:
        """What `read` gives, once every rank has its own; None when all agreed to leave instead.

        skipped: what this rank did with the last step, which must be what the others did.

        Raises:
            LostRank: another rank could not read its data. Whatever `read` raises, on the rank where it did.
            TrainingError: the ranks do not agree on the last step.
        """
        self.phase("data")
        if not self._votes:
            return read()
        self._fetcher.start(read)
        told = False
        while True:
            ready = self._fetcher.wait(self._poll_s if not told else 0.0)
            if ready and not told:
                told = True
                self.phase("waiting for the data of other ranks")
            self._follow(None if ready else self._fetcher.thread_id)
            failed = rank + 1 if ready and self._fetcher.failed else 0
            waiting, fails, *skips = self._vote([int(not ready), failed, int(skipped), int(not skipped)])
            _same_everywhere(skips)
            if failed:
                return self._fetcher.result()  # raises
            if fails:
                text = f"rank {fails - 1} could not read its data"
                lost = LostRank(text, hint="see its own message")
                raise self.explain(lost) or lost
            if self.leaving is not None:
                return None
            if not waiting:
                return self._fetcher.result()

    def agree(self, skipped: bool) -> None:
        """As in `data`, where there is no next batch to read.

        Raises:
            TrainingError: the ranks do not agree on the last step.
        """
        if self._votes:
            _same_everywhere(self._vote([int(skipped), int(not skipped)]))

    def _follow(self, thread_id: int | None) -> None:
        if self.watchdog is not None:
            self.watchdog.follow(thread_id)

    def explain(self, error: Exception) -> LostRank | None:
        """Who is lost, when a collective failed with `error`; None when that cannot be said."""
        return None if self.watchdog is None else self.watchdog.explain(error)

    def close(self, ended: str = "finished", code: int = 0) -> None:
        """Stop listening; code: with what this rank leaves when it leaves alone."""
        if self.watchdog is not None:
            self.watchdog.close(ended, code)
        if self._signals is not None:
            self._signals.stop()


def _same_everywhere(skips: Sequence[int]) -> None:
    """skips: whether any rank skipped the last step, and whether any applied it."""
    if all(skips):
        raise TrainingError(
            "the ranks do not agree whether the last step was skipped",
            why="their losses or gradient norms differ: replicas have drifted apart, or a device computes wrongly",
            hint="resume from the last checkpoint; if it happens again, test the machines one by one",
        )
