"""Options of the step guard: plain numbers. No torch here, since the configuration takes defaults and bounds from this file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from megatron.errors import ConfigError

BudgetPolicy = Literal["stop", "rewind"]
MIN_SPIKE_WINDOW = 8  # steps; fewer say too little about the usual spread


@dataclass(frozen=True)
class GuardOptions:
    """Which steps the guard skips, and how many of them it allows; the reliability section has the same defaults.

    Args:
        budget: steps that may be skipped within `window` steps.
        window: length of that window in steps.
        on_budget: what one more skipped step does: stop, or rewind to the last checkpoint and continue after the bad samples.
        max_rewinds: rewinds of a run before it stops.
        spike_sigma: a loss or gradient norm this many standard deviations above the mean is a spike; 0 is off.
        spike_window: applied steps over which mean and standard deviation are taken.
        overflows: skipped steps in a row that exhaust the budget while a loss scale is searched (fp16).

    Raises:
        ConfigError: an unknown policy, or a window too short for statistics.
    """

    budget: int = 10
    window: int = 1000
    on_budget: BudgetPolicy = "stop"
    max_rewinds: int = 3
    spike_sigma: float = 0.0
    spike_window: int = 128
    overflows: int = 50

    def __post_init__(self) -> None:
        policies = get_args(BudgetPolicy)
        if self.on_budget not in policies:
            raise ConfigError(f"unknown on_skip_budget '{self.on_budget}'", hint="one of " + ", ".join(policies))
        if self.spike_sigma and self.spike_window < MIN_SPIKE_WINDOW:
            message = f"spike_window {self.spike_window} is too short for a mean and a standard deviation"
            raise ConfigError(message, hint=f"at least {MIN_SPIKE_WINDOW}")
