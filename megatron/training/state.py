"""What a run must remember to go on where it stopped: a few numbers, stored as JSON in every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class TrainState:
    """Counters of one run.

    Attributes:
        iteration: optimizer steps tried, skipped ones included; the number in `global_step<N>`.
        skipped_iterations: those that changed nothing; the learning rate schedule advances with the others only.
        consumed_samples: the data cursor, the global number of the next sample.
        consumed_tokens: tokens read.
        best_validation_loss: the lowest so far, None before the first validation.
        best_iteration: its step.
        rewinds: how often the weights went back to an earlier checkpoint.
        guard: state of `reliability/guard.py`.
    """

    iteration: int = 0
    skipped_iterations: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    best_validation_loss: float | None = None
    best_iteration: int | None = None
    rewinds: int = 0
    guard: dict[str, Any] = field(default_factory=dict)

    @property
    def applied_iterations(self) -> int:
        """Steps that changed the weights: the argument of the learning rate schedule."""
        return self.iteration - self.skipped_iterations

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainState:
        """Inverse of `to_dict`; unknown keys (of a later release) are ignored, missing ones take their default.

        Raises:
            ValueError: a value that no run can have.
        """
        known = {f.name: f.type for f in fields(cls)}
        mine = {name: value for name, value in values.items() if name in known}
        for name, value in mine.items():
            if not _fits(value, str(known[name])):
                raise ValueError(f"{name} is {value!r:.60}")
        return cls(**mine)


def _fits(value: Any, kind: str) -> bool:
    """Whether a value is of a field of type `kind`; counters are not negative."""
    if value is None:
        return "None" in kind
    if kind.startswith("float"):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind.startswith("int"):
        return type(value) is int and 0 <= value < 1 << 62
    guard = isinstance(value, dict) and all(isinstance(part, list) for part in value.values())
    return guard and all((isinstance(n, int | float) and abs(n) < 1e300) or n != n for part in value.values() for n in part)
