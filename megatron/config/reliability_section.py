"""The section that says how a run meets trouble: signals and time limits, bad numbers, ranks that hang. All keys are ours."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron.config.base import Names, Section


class ReliabilitySection(Section):
    """When to leave with the work saved, what to skip, and how long a rank may be silent."""

    time_limit: str | int | float | None = None
    exit_signals: Names = ("SIGTERM", "SIGUSR1", "SIGINT")
    skip_budget: int = Field(default=10, ge=0)
    skip_window: int = Field(default=1000, gt=0)
    on_skip_budget: Literal["stop", "rewind"] = "stop"
    spike_sigma: float = Field(default=0.0, ge=0)
    spike_window: int = Field(default=128, ge=8)
    hang_timeout: float = Field(default=1800.0, ge=0)
