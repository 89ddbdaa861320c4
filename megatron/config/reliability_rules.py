"""The cross rules of signals, time limits and the guard of bad numbers; see `rules.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.config.rule import Rule
from megatron.errors import ConfigError
from megatron.reliability.signals import seconds_of, signal_numbers


def _problem(read: Callable[[Any], Any], value: Any) -> str:
    """What `read` says against a value; empty when it takes it."""
    try:
        read(value)
    except ConfigError as error:
        return error.what + (f": {error.why}" if error.why else "")
    return ""


RELIABILITY_RULES: tuple[Rule, ...] = (
    Rule(
        ("time_limit",),
        lambda r: bool(_problem(seconds_of, r.reliability.time_limit)),
        lambda r: _problem(seconds_of, r.reliability.time_limit),
        'write "3:50:00" (hours), "45:00" (minutes) or seconds',
    ),
    Rule(
        ("exit_signals",),
        lambda r: bool(_problem(signal_numbers, r.reliability.exit_signals)),
        lambda r: _problem(signal_numbers, r.reliability.exit_signals),
        "name signals such as SIGTERM, SIGUSR1, SIGINT; an empty list catches none",
    ),
    Rule(
        ("on_skip_budget", "save"),
        lambda r: r.reliability.on_skip_budget == "rewind" and r.checkpoint.save is None,
        lambda r: "on_skip_budget: rewind has no checkpoint to go back to",
        "set save, or on_skip_budget: stop",
    ),
)
