"""What a synthetic task is: parameters that say how an example is drawn, and the random draws that all of them share.

A task draws `n` examples at once from a numpy generator, without a loop over examples. Which generator is not its business:
`dataset.py` gives each block of examples its own, so that example i is a function of (seed, slice, i) alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from megatron.data.labels import IGNORED
from megatron.errors import ConfigError

Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Examples:
    """Attributes:
    inputs: i64 [n, s], what the model reads.
    labels: i64 [n, s], what it has to say at each position (no shift is applied later), IGNORED where nothing is asked.
    """

    inputs: Ids
    labels: Ids


@dataclass(frozen=True)
class Task(ABC):
    """The parameters of a task; each field is a key of its slices in YAML.

    Class attributes: `name`, the word that selects it; `reads_text`: it is made of words and needs a tokenizer; `stored`: its
    examples are those of a data set (`stored.py`), else they are drawn without end.
    """

    name: ClassVar[str] = ""
    reads_text: ClassVar[bool] = False
    stored: ClassVar[bool] = False

    @property
    @abstractmethod
    def rows(self) -> int:
        """Ids are below this."""

    @property
    @abstractmethod
    def seq_length(self) -> int:
        """Tokens of an example (s)."""

    @abstractmethod
    def draw(self, rng: np.random.Generator, count: int) -> Examples:
        """`count` examples."""

    def parameters(self) -> dict[str, Any]:
        """Field -> value, for reports."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.repr}


def need(condition: bool, task: Task, rule: str) -> None:
    """Refuse parameters with which no example can be drawn.

    Raises:
        ConfigError: `rule` does not hold.
    """
    if not condition:
        values = ", ".join(f"{name} {value}" for name, value in task.parameters().items())
        raise ConfigError(f"no {task.name} example can be made", where=values, why=rule)


def distinct(rng: np.random.Generator, rows: int, count: int, low: int, high: int) -> Ids:
    """[rows, count]: in each row `count` different integers of [low, high), every ordered choice equally likely."""
    scores = rng.random((rows, high - low), dtype=np.float32)
    if count < high - low:
        chosen = np.argpartition(scores, count - 1, axis=1)[:, :count]
        order = np.argsort(np.take_along_axis(scores, chosen, 1), axis=1)
        return np.take_along_axis(chosen, order, 1).astype(np.int64) + low
    return np.argsort(scores, axis=1).astype(np.int64) + low


def weighted_distinct(rng: np.random.Generator, rows: int, count: int, weights: NDArray[np.float64]) -> Ids:
    """[rows, count]: indices drawn one after the other without replacement, each by its weight among those that are left.

    The order is kept: with independent exponential clocks of these rates, it is the order in which they ring.
    """
    clocks = rng.exponential(size=(rows, len(weights))) / weights
    return np.argsort(clocks, axis=1)[:, :count].astype(np.int64)


def first_places(ids: Ids) -> Ids:
    """[n, p]: the leftmost column of the row that holds the same id; smaller than its own where the id was seen before."""
    order = np.argsort(ids, axis=1, kind="stable")
    ranked = np.take_along_axis(ids, order, 1)
    starts = np.ones(ids.shape, dtype=bool)
    starts[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    start_of = np.maximum.accumulate(np.where(starts, np.arange(ids.shape[1]), 0), axis=1)
    first = np.empty_like(order)
    np.put_along_axis(first, order, np.take_along_axis(order, start_of, 1), 1)
    return first.astype(np.int64)


def blank_labels(rows: int, length: int) -> Ids:
    """[rows, length] of IGNORED."""
    return np.full((rows, length), IGNORED, dtype=np.int64)


def checked(kind: type[Task], values: Mapping[str, Any], **bound: Any) -> Task:
    """A task from YAML values.

    Args:
        bound: further fields, such as a tokenizer, that no YAML holds.

    Raises:
        ConfigError: a name is unknown or missing, a value has the wrong type, or the values do not go together.
    """
    known = {f.name: f for f in fields(kind) if f.repr}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(
                f"{kind.name} has no parameter '{name}'", hint=f"its parameters: examples, {', '.join(sorted(known))}"
            )
        expected = type(known[name].default) if isinstance(known[name].default, (bool, int, float, str)) else int
        fits = type(value) is expected or (expected is float and type(value) is int)
        if not fits:
            raise ConfigError(f"{kind.name}: {name} is {value!r}", why=f"a {expected.__name__} is expected")
    try:
        return kind(**values, **bound)
    except TypeError as error:  # a field without a default was not given
        raise ConfigError(f"{kind.name} lacks a parameter", why=str(error).split("__init__() ")[-1]) from None
