"""One cross rule: what a row of the tables in `rules.py`, and in the other `*_rules.py`, is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron.config.schema import RunConfig


@dataclass(frozen=True)
class Rule:
    """One cross rule.

    Attributes:
        keys: the keys whose places are named.
        broken: is the rule broken?
        message: what is wrong, with the numbers.
        hint: what to try.
        needs: the rule asks for a key that is absent; such rules wait while there are unknown keys (typos).
    """

    keys: tuple[str, ...]
    broken: Callable[[RunConfig], bool]
    message: Callable[[RunConfig], str]
    hint: str = ""
    needs: bool = False
