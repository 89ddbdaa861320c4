"""What a row of the tables is: a key, a value that is not its default, what it needs beside it, and where it is looked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.arrival.case import Case

SAME = object()


@dataclass(frozen=True)
class Arrival:
    """One key on its way.

    Attributes:
        value: what the YAML says; not the default.
        look: finds what the part that uses the key has received.
        received: what must be there; the value itself where it is passed on as it stands. Floats are compared with `tolerance`.
        beside: other keys of the YAML; what `look` finds with these alone must differ, else it sees nothing.
        tolerance: relative, for measured numbers.
    """

    value: Any
    look: Callable[[Case], Any]
    received: Any = SAME
    beside: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-9

    @property
    def expected(self) -> Any:
        """What must be there."""
        return self.value if self.received is SAME else self.received
