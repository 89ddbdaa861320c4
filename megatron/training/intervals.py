"""At which steps something happens, as pure functions of the step number, by GPT-NeoX's rules.

A step number counts finished steps: the first check is made with 1. Step 0 is the untrained model.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from megatron.errors import ConfigError


def logarithmic_steps(factor: float, train_iters: int) -> set[int]:
    """Integer parts of 1, factor, factor^2, ... below or at `train_iters` (checkpoint_scale: log)."""
    if factor <= 1:
        raise ConfigError(f"checkpoint_factor {factor:g} must be above 1 with checkpoint_scale log")
    steps, value = set(), 1.0
    while int(value) <= train_iters:
        steps.add(int(value))
        value *= factor
    return steps


@dataclass(frozen=True)
class SaveRule:
    """When to save: every `factor` steps (linear) or at its powers (log), at `extra` steps, and at the end of training.

    factor None means `extra` and the end only. A rule with `enabled` False (no `save` folder) never saves.
    """

    factor: float | None = None
    scale: str = "linear"
    extra: Collection[int] = ()
    train_iters: int = 0
    enabled: bool = True
    _powers: frozenset[int] = field(init=False, repr=False, default=frozenset())

    def __post_init__(self) -> None:
        if self.scale not in ("linear", "log"):
            raise ConfigError(f"unknown checkpoint_scale '{self.scale}'", hint="one of linear, log")
        if self.factor is None:
            return
        if self.scale == "log":
            object.__setattr__(self, "_powers", frozenset(logarithmic_steps(self.factor, self.train_iters)))
        elif self.factor < 1 or self.factor != int(self.factor):
            raise ConfigError(f"checkpoint_factor {self.factor:g} must be a whole number of steps, at least 1")

    def due(self, iteration: int) -> bool:
        """Whether to save after step `iteration`; 0 is due only when `extra` names it."""
        if not self.enabled:
            return False
        if iteration in self.extra:
            return True
        if iteration == 0 or self.factor is None:
            return False
        return iteration in self._powers if self.scale == "log" else iteration % int(self.factor) == 0

    def count(self) -> int:
        """How many saves a whole training makes, the one at its end included; 0 for a rule that never saves."""
        if not self.enabled:
            return 0
        steps = {step for step in {*self.extra, *self._powers} if 1 <= step <= self.train_iters} | {self.train_iters}
        if self.factor is None or self.scale == "log":
            return len(steps)
        factor = int(self.factor)
        return self.train_iters // factor + sum(step % factor != 0 for step in steps)


def every(interval: int | None, iteration: int) -> bool:
    """Whether `iteration` is a positive multiple of `interval`; None or 0 means never."""
    return bool(interval) and iteration > 0 and iteration % int(interval or 1) == 0
