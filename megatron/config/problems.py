"""What is wrong in a configuration, gathered before it is reported.

A person who made three mistakes should read three lines, not run the program three times. Every check therefore adds a
`Problem`, and only `raise_if_any` turns them into the one `ConfigError` that ends the process.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron.errors import ConfigError


@dataclass(frozen=True)
class Problem:
    """One mistake: the sentence, the place (`file:line`), what to try, and the cause where the sentence does not say it."""

    message: str
    place: str = ""
    hint: str = ""
    why: str = ""


@dataclass
class Problems:
    """A growing list of mistakes."""

    items: list[Problem] = field(default_factory=list)

    def add(self, message: str, place: str = "", hint: str = "", *, why: str = "") -> None:
        """Remember one mistake; the same one twice is kept once."""
        problem = Problem(message, place, hint, why)
        if problem not in self.items:
            self.items.append(problem)

    def raise_if_any(self) -> None:
        """Raise one `ConfigError` that lists everything found so far, or do nothing."""
        if not self.items:
            return
        if len(self.items) == 1:
            only = self.items[0]
            raise ConfigError(only.message, where=only.place or None, why=only.why or None, hint=only.hint or None)
        lines = [f"{len(self.items)} problems in the configuration"]
        for number, problem in enumerate(self.items, 1):
            lines.append(f"  {number}. {problem.message}")
            labelled = (("where", problem.place), ("why", problem.why), ("try", problem.hint))
            lines += [f"     {label}: {text}" for label, text in labelled if text]
        raise ConfigError("\n".join(lines))
