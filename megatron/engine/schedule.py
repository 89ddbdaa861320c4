"""Learning rate as a pure function of the number of optimizer steps taken: GPT-NeoX's four curves.

With n steps taken, base rate lr, warm-up w = warmup * T and horizon T: for n <= w the rate is lr * max(1, n) / w;
or, with a warm-up start a (timm's curve, that of the Based recipes), a + n (lr - a) / w for n < w;
after it one of

    linear       lr * (D - m) / D                              m = n - w,  D = T - w
    cosine       min + (lr - min) / 2 * (1 + cos(pi * m / D))
    exponential  lr * exp(-0.693 * m / D)
    constant     lr

and never below min. Two differences from NeoX, on purpose: after the horizon the rate stays at its value for n = T, where
NeoX's cosine rises again and its exponential continues to fall; and a warm-up shorter than one step starts at lr, where NeoX's
first step uses lr / w, many times the peak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.errors import ConfigError

STYLES = ("constant", "linear", "cosine", "exponential")


@dataclass(frozen=True)
class ScheduleConfig:
    """A curve. `horizon` (T) is in optimizer steps; `warmup` is a fraction of it and may give a fractional step.

    warmup_start: the rate of the first step, from which the warm-up rises; None is GPT-NeoX's warm-up, which begins near 0.
    """

    lr: float
    horizon: int
    style: str = "linear"
    warmup: float = 0.01
    min_lr: float = 0.0
    warmup_start: float | None = None

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ConfigError(f"unknown lr_decay_style '{self.style}'", hint="one of " + ", ".join(STYLES))
        if self.min_lr > self.lr:
            raise ConfigError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}")
        if self.warmup < 0:
            raise ConfigError(f"warmup must not be negative, got {self.warmup:g}")

    @property
    def warmup_steps(self) -> float:
        """w, the length of the warm-up in steps."""
        return self.warmup * self.horizon


def decay_horizon(train_iters: int, decay_iters: int | None = None, decay_fraction: float | None = None) -> int:
    """T by NeoX's rules: `lr_decay_iters`, else `floor(train_iters * lr_decay_fraction)`, else `train_iters`; at least 1."""
    if decay_iters is None:
        decay_iters = train_iters if decay_fraction is None else math.floor(train_iters * decay_fraction)
    return max(1, decay_iters)


def learning_rate(step: int, config: ScheduleConfig) -> float:
    """The learning rate of an optimizer step, given the number of steps before it (0 for the first)."""
    n = min(step, config.horizon)
    warmup = config.warmup_steps
    if config.warmup_start is not None and n < warmup:
        return config.warmup_start + n * (config.lr - config.warmup_start) / warmup
    if config.warmup_start is None and warmup > 0 and n <= warmup:
        return config.lr * min(1.0, max(1, n) / warmup)
    m, length = n - warmup, config.horizon - warmup
    if config.style == "linear":
        rate = config.lr * (length - m) / length
    elif config.style == "cosine":
        rate = config.min_lr + (config.lr - config.min_lr) / 2.0 * (math.cos(math.pi * m / length) + 1.0)
    elif config.style == "exponential":
        rate = config.lr * math.exp(-0.693 * m / length)
    else:
        rate = config.lr
    return max(rate, config.min_lr)
