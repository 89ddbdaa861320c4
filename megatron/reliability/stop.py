"""Stops a run on a signal, at the time limit or when a rank fails, on all ranks at the same step.

Once per step, when the next batch has been read, all ranks reach a consensus on the CPU (`reliability/consensus.py`): has any
rank received a signal, is the time up, does any rank still wait for data, has any skipped the last step? So all ranks handle a
signal at the same point: evaluations and waits for data are abandoned, a step or a save is finished first.
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

# Exit codes of a process that was asked to stop: its work is saved (the same command resumes), or there is no save folder.
EXIT_SAVED, EXIT_UNSAVED = 75, 76
T = TypeVar("T")


class Control:
    """Checks of a run for reasons to stop; one per rank, and the owner calls `close`.

    Args:
        consensus: of all ranks; None for one process.
        signals: started; None catches no signals.
        limit: time limit; None is without.
        watchdog: started; None is without.
        poll_s: seconds between two checks of a rank that waits for data.
    """

    def __init__(
        self,
        consensus: Consensus | None = None,
        signals: StopSignals | None = None,
        limit: TimeLimit | None = None,
        watchdog: Watchdog | None = None,
        poll_s: float = 0.5,
    ) -> None:
        self.consensus, self.watchdog = consensus or Consensus(), watchdog
        self._signals, self._limit, self._poll_s = signals, limit, poll_s
        self._active = signals is not None or limit is not None or not self.consensus.alone
        self._fetcher = Prefetcher()
        self.leaving: str | None = None

    def phase(self, name: str, step: int | None = None) -> None:
        """Tell the watchdog what the training thread is doing."""
        if self.watchdog is not None:
            self.watchdog.move(name, step)

    def settled(self) -> None:
        """Tell the watchdog that the first step is done."""
        if self.watchdog is not None:
            self.watchdog.settle()

    def took(self, *, step_s: float = 0.0, save_s: float = 0.0) -> None:
        """Record the duration of a step or a save, for the time limit."""
        if self._limit is not None:
            self._limit.took(step_s=step_s, save_s=save_s)

    def stop_asked(self) -> bool:
        """Whether any rank has a reason to stop; every rank calls this at the same point."""
        if self._active:
            self._reduce([])
        return self.leaving is not None

    def _reduce(self, flags: Sequence[int]) -> list[int]:
        """All-reduce (max) signal, time limit and `flags`; returns the reduced flags."""
        received = self._signals.received if self._signals is not None else 0
        time_up = self._limit is not None and self._limit.is_up()
        number, up, *reduced = self.consensus.reduce_max([received, int(time_up), *flags])
        if self.leaving is None and (number or up):
            self.leaving = signal.Signals(number).name if number else "time_limit"
        return reduced

    def data(self, read: Callable[[], T], rank: int, skipped: bool) -> T | None:
        """Read the next batch, and wait until every rank has its own.

        Args:
            read: reads this rank's batch; runs in another thread.
            rank: this rank.
            skipped: this rank skipped the last step; must be equal on all ranks.

        Returns:
            The result of `read`; None if all ranks stop instead.

        Raises:
            LostRank: another rank could not read its data. On that rank, whatever `read` raises.
            TrainingError: the ranks disagree about the last step.
        """
        self.phase("data")
        if not self._active:
            return read()
        self._fetcher.start(read)
        announced = False
        while True:
            ready = self._fetcher.wait(self._poll_s if not announced else 0.0)
            if ready and not announced:
                announced = True
                self.phase("waiting for the data of other ranks")
            self._follow(None if ready else self._fetcher.thread_id)
            failed = rank + 1 if ready and self._fetcher.failed else 0
            # Every iteration is one collective: a rank that already has its batch keeps joining until the last one has it.
            waiting, failed_rank, *skips = self._reduce([int(not ready), failed, int(skipped), int(not skipped)])
            _check_equal(skips)
            if failed:
                return self._fetcher.result()  # raises
            if failed_rank:
                text = f"rank {failed_rank - 1} could not read its data"
                lost = LostRank(text, hint="see its own message")
                raise self.explain(lost) or lost
            if self.leaving is not None:
                return None
            if not waiting:
                return self._fetcher.result()

    def agree(self, skipped: bool) -> None:
        """Check the last step as in `data`, when there is no next batch to read.

        Raises:
            TrainingError: the ranks disagree about the last step.
        """
        if self._active:
            _check_equal(self._reduce([int(skipped), int(not skipped)]))

    def _follow(self, thread_id: int | None) -> None:
        if self.watchdog is not None:
            self.watchdog.follow(thread_id)

    def explain(self, error: Exception) -> LostRank | None:
        """The lost rank, after a collective failed with `error`; None if it is unknown."""
        return None if self.watchdog is None else self.watchdog.explain(error)

    def close(self, ended: str = "finished", code: int = 0) -> None:
        """Stop watchdog and signal handling.

        Args:
            ended: how this rank ends, for the others.
            code: its exit code.
        """
        if self.watchdog is not None:
            self.watchdog.close(ended, code)
        if self._signals is not None:
            self._signals.stop()


def _check_equal(skips: Sequence[int]) -> None:
    """Raise TrainingError if some ranks skipped the last step and others applied it (the two flags of `skips`)."""
    if all(skips):
        raise TrainingError(
            "the ranks do not agree whether the last step was skipped",
            why="their losses or gradient norms differ: replicas have drifted apart, or a device computes wrongly",
            hint="resume from the last checkpoint; if it happens again, test the machines one by one",
        )
