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
    """One mistake.

    Attributes:
        message: what is wrong.
        place: `file:line`.
        hint: what to try.
        why: the cause, if the message does not name it.
    """

    message: str
    place: str = ""
    hint: str = ""
    why: str = ""


class Problems:
    """A growing list of mistakes."""

    def __init__(self) -> None:
        self.items: list[Problem] = []

    def add(self, message: str, place: str = "", hint: str = "", *, why: str = "") -> None:
        """Append one mistake, unless it is listed already."""
        problem = Problem(message, place, hint, why)
        if problem not in self.items:
            self.items.append(problem)

    def raise_if_any(self) -> None:
        """Raise one `ConfigError` that lists everything so far, or do nothing."""
        if len(self.items) == 1:
            message, place, hint, why = self.items[0]
            raise ConfigError(message, where=place or None, why=why or None, hint=hint or None)
        if self.items:
            lines = [f"{len(self.items)} problems in the configuration"]
            for number, (message, place, hint, why) in enumerate(self.items, 1):
                labelled = (("where", place), ("why", why), ("try", hint))
                lines += [f"  {number}. {message}", *(f"     {label}: {text}" for label, text in labelled if text)]
            raise ConfigError("\n".join(lines))
