"""Options of the loop: plain numbers, no configuration file."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron.reliability.guard_options import GuardOptions
from megatron.training.intervals import SaveRule


@dataclass(frozen=True)
class FitOptions:
    """How long to train and when to do what.

    Attributes:
        train_iters: the step at which training ends.
        samples_per_step: the global batch.
        seq_length: tokens per sample.
        save_rule: when to save.
        eval_interval: steps between validations, None for never.
        eval_at_start: validate before the first step too.
        exit_interval: leave, after a save, when the step is a multiple of it.
        guard: which steps are skipped, and how many.
    """

    train_iters: int
    samples_per_step: int
    seq_length: int
    save_rule: SaveRule = field(default_factory=lambda: SaveRule(enabled=False))
    eval_interval: int | None = None
    eval_at_start: bool = False
    exit_interval: int | None = None
    guard: GuardOptions = field(default_factory=GuardOptions)
