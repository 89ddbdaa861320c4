"""Bad numbers: which steps are skipped, how many may be, and what happens when they are too many.

The engine skips a step whose loss or gradient norm is not finite or above the limits given here, before its optimizer runs
(`engine/skip_step.py`); weights, optimizer and schedule stay as they were, bitwise. The limits come from the steps applied
before, which every rank knows alike, so no message is needed. The counters travel in the training state: a resumed run decides
as the uninterrupted one.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.engine.skip_step import StepLimits
from megatron.reliability.guard_options import GuardOptions

# The window's own spread is floored at this part of its mean: a curve without noise must not make every wiggle a spike.
_LEAST_SPREAD = 0.02


@dataclass(frozen=True)
class StepDecision:
    """Of one step. reason: why it was skipped, empty for an applied one. spent: the budget is used up, this step included."""

    reason: str = ""
    budget_exhausted: bool = False


class StepGuard:
    """The memory of a run's numbers. scaled: a loss scale is being searched, so that overflows are usual."""

    def __init__(self, options: GuardOptions, scaled: bool = False) -> None:
        self.options, self._scaled = options, scaled
        self._losses: deque[float] = deque(maxlen=options.spike_window)
        self._norms: deque[float] = deque(maxlen=options.spike_window)
        self._skips: list[int] = []
        self._overflows = 0

    def limits(self) -> StepLimits:
        """For the next step; infinite while the rule is off or the window is not full."""
        if not self.options.spike_sigma or len(self._losses) < self.options.spike_window:
            return StepLimits()
        return StepLimits(self._limit(self._losses), self._limit(self._norms))

    def _limit(self, values: deque[float]) -> float:
        mean = statistics.fmean(values)
        spread = max(statistics.pstdev(values, mean), _LEAST_SPREAD * abs(mean))
        return mean + self.options.spike_sigma * spread

    def decide(self, iteration: int, loss: float, norm: float, skipped: bool) -> StepDecision:
        """Count step `iteration`, with what the engine said of it."""
        if not skipped:
            self._overflows = 0
            if self.options.spike_sigma:
                self._losses.append(loss)
                self._norms.append(norm)
            return StepDecision()
        reason = self._reason(loss, norm)
        if self._scaled and math.isfinite(loss) and not math.isfinite(norm):
            self._overflows += 1
            return StepDecision(reason + ", the loss scale goes down", self._overflows >= self.options.overflows)
        self._skips = [step for step in self._skips if step > iteration - self.options.window] + [iteration]
        return StepDecision(reason, len(self._skips) > self.options.budget)

    def _reason(self, loss: float, norm: float) -> str:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return "the gradient norm is not finite"
        limits = self.limits()
        if loss > limits.loss:
            return f"a spike: the loss {loss:.4g} is above {limits.loss:.4g}"
        return f"a spike: the gradient norm {norm:.4g} is above {limits.grad_norm:.4g}"

    def budget_text(self) -> str:
        """The budget in words, for the message that ends the run."""
        if self._overflows >= self.options.overflows:
            return f"{self._overflows} steps in a row overflowed"
        return f"{len(self._skips)} steps were skipped within {self.options.window}, {self.options.budget} are allowed"

    def reset(self) -> None:
        """After a rewind: what is behind us no longer counts, and the window is that of other weights."""
        self._skips, self._overflows = [], 0
        self._losses.clear()
        self._norms.clear()

    def state(self) -> dict[str, Any]:
        """As JSON types; empty for a calm run without a spike rule."""
        state: dict[str, Any] = {"skips": self._skips} if self._skips else {}
        if self._losses:
            state |= {"losses": list(self._losses), "norms": list(self._norms)}
        return state

    def load(self, state: Mapping[str, Any]) -> None:
        """Put back `state`."""
        self._skips = [int(step) for step in state.get("skips", ())]
        for values, name in ((self._losses, "losses"), (self._norms, "norms")):
            values.clear()
            values.extend(float(value) for value in state.get(name, ()))
