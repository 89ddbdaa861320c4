"""What is wrong in a configuration, collected before it is reported.

A person who made three mistakes should read three lines, not run the program three times. Every check adds to `Problems`, and
only `raise_if_any` turns them into the one `ConfigError` that ends the process.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron.errors import ConfigError


class Violation(NamedTuple):
    """A broken cross rule.

    Attributes:
        keys: the keys whose places are reported.
        message: what is wrong, with the numbers.
        hint: what to try.
        missing: a key is absent. Not reported beside unknown keys, since one of those may be its misspelling.
    """

    keys: tuple[str, ...]
    message: str
    hint: str = ""
    missing: bool = False


class Problem(NamedTuple):
    """One mistake: the sentence, the place (`file:line`), and what to try."""

    message: str
    place: str = ""
    hint: str = ""


class Problems:
    """A growing list of mistakes."""

    def __init__(self) -> None:
        self.items: list[Problem] = []

    def add(self, message: str, place: str = "", hint: str = "") -> None:
        """Append one mistake, unless it is listed already."""
        problem = Problem(message, place, hint)
        if problem not in self.items:
            self.items.append(problem)

    def raise_if_any(self) -> None:
        """Raise one `ConfigError` that lists everything so far, or do nothing."""
        if len(self.items) == 1:
            message, place, hint = self.items[0]
            raise ConfigError(message, where=place or None, hint=hint or None)
        if self.items:
            lines = [f"{len(self.items)} problems in the configuration"]
            for number, (message, place, hint) in enumerate(self.items, 1):
                lines += [
                    f"  {number}. {message}",
                    *([f"     where: {place}"] * bool(place)),
                    *([f"     try: {hint}"] * bool(hint)),
                ]
            raise ConfigError("\n".join(lines))
