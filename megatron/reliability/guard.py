"""Loss-spike guard: which steps are skipped, how many may be, and what happens when the budget is exhausted.

The engine skips a step whose loss or gradient norm is not finite or exceeds the limits from here, before its optimizer runs
(`engine/skip_step.py`); weights, optimizer and schedule stay bitwise as they were. The limits come from earlier applied steps,
which are equal on every rank, so that no communication is needed. The counters are in the training state: a resumed run
decides like an uninterrupted one.
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

# The standard deviation is at least this fraction of the mean: on a curve without noise not every wiggle is a spike.
_LEAST_SPREAD = 0.02


@dataclass(frozen=True)
class StepDecision:
    """The guard's decision about one step.

    Attributes:
        reason: why it was skipped; empty for an applied step.
        budget_exhausted: the budget is exhausted, this step included.
    """

    reason: str = ""
    budget_exhausted: bool = False


class StepGuard:
    """Tracks the losses, gradient norms and skipped steps of a run.

    Args:
        options: limits.
        scaled: the loss is scaled (fp16), so that overflows are normal.
    """

    def __init__(self, options: GuardOptions, scaled: bool = False) -> None:
        self.options, self._scaled = options, scaled
        self._losses: deque[float] = deque(maxlen=options.spike_window)
        self._norms: deque[float] = deque(maxlen=options.spike_window)
        self._skips: list[int] = []
        self._overflows = 0

    def limits(self) -> StepLimits:
        """Limits for the next step; infinite while the spike rule is off or its window is not full."""
        if not self.options.spike_sigma or len(self._losses) < self.options.spike_window:
            return StepLimits()
        return StepLimits(self._limit(self._losses), self._limit(self._norms))

    def _limit(self, values: deque[float]) -> float:
        mean = statistics.fmean(values)
        spread = max(statistics.pstdev(values, mean), _LEAST_SPREAD * abs(mean))
        return mean + self.options.spike_sigma * spread

    def decide(self, iteration: int, loss: float, norm: float, skipped: bool) -> StepDecision:
        """Record the engine's result of step `iteration`."""
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
        """The exhausted budget, for the message that ends the run."""
        if self._overflows >= self.options.overflows:
            return f"{self._overflows} steps in a row overflowed"
        return f"{len(self._skips)} steps were skipped within {self.options.window}, {self.options.budget} are allowed"

    def reset(self) -> None:
        """Clear everything after a rewind: earlier skips no longer count, and the window belongs to other weights."""
        self._skips, self._overflows = [], 0
        self._losses.clear()
        self._norms.clear()

    def state(self) -> dict[str, Any]:
        """The state as JSON types; empty for a run without skips and without a spike rule."""
        state: dict[str, Any] = {"skips": self._skips} if self._skips else {}
        if self._losses:
            state |= {"losses": list(self._losses), "norms": list(self._norms)}
        return state

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore a `state`."""
        self._skips = [int(step) for step in state.get("skips", ())]
        for values, name in ((self._losses, "losses"), (self._norms, "norms")):
            values.clear()
            values.extend(float(value) for value in state.get(name, ()))
