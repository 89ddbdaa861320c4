"""Associative recall: multi-query recall of Zoology and Based (arXiv 2312.04927, 2402.18668), and JRT's set disjointness.

Drawing and composing are apart: `compose_*` are functions of the drawn numbers alone, so that the layout can be checked by hand
and against another generator whatever its random numbers are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from megatron.synthetics.task import Examples, Ids, Task, blank_labels, distinct, need, weighted_distinct


def compose_mqar(keys: Ids, values: Ids, gaps: Ids, length: int) -> Examples:
    """Key-value pairs, then queries.

    Args:
        keys, values: [n, k]. gaps: [n, k], the slot of each key's query; slot g is the g-th pair of places behind the context.
        length: tokens per example.

    Returns:
        `k1 v1 k2 v2 ...` followed by zeros in which key i stands at place 2 k + 2 gap_i, where its value is the label.
    """
    rows, pairs = keys.shape
    inputs = np.zeros((rows, length), dtype=np.int64)
    inputs[:, 0 : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = keys, values
    labels = blank_labels(rows, length)
    places = 2 * pairs + 2 * gaps
    np.put_along_axis(inputs, places, keys, 1)
    np.put_along_axis(labels, places, values, 1)
    return Examples(inputs, labels)


@dataclass(frozen=True)
class MultiQueryRecall(Task):
    """Multi-query associative recall (MQAR): `pairs` keys with values, each key asked for once later on.

    Keys are drawn from [1, V/2), values from [V/2, V). How far behind the context a key is asked for follows the power law
    a s^(a-1) over slots s = 1, 2, ...; earlier keys choose first. `random_non_queries` puts random ids, which may collide with
    keys, where nothing is asked.
    """

    name: ClassVar[str] = "mqar"
    length: int
    pairs: int
    vocab_size: int = 8192
    power_a: float = 0.01
    random_non_queries: bool = True

    def __post_init__(self) -> None:
        need(self.length % 2 == 0, self, "length must be even")
        need(self.pairs >= 1 and 4 * self.pairs <= self.length, self, "4 x pairs tokens must fit into length")
        need(self.vocab_size > self.length, self, "vocab_size must be larger than length")
        need(self.vocab_size // 2 - 1 >= self.pairs, self, "vocab_size / 2 must be larger than pairs")
        need(self.power_a > 0, self, "power_a must be positive")

    @property
    def rows(self) -> int:
        """V."""
        return self.vocab_size

    @property
    def seq_length(self) -> int:
        """As asked for."""
        return self.length

    def draw(self, rng: np.random.Generator, count: int) -> Examples:
        """See the class."""
        half = self.vocab_size // 2
        keys = distinct(rng, count, self.pairs, 1, half)
        values = distinct(rng, count, self.pairs, half, self.vocab_size)
        slots = np.arange(1, (self.length - 2 * self.pairs) // 2 + 1, dtype=np.float64)
        weights = self.power_a * slots ** (self.power_a - 1)
        examples = compose_mqar(keys, values, weighted_distinct(rng, count, self.pairs, weights), self.length)
        if self.random_non_queries:
            filler = rng.integers(self.vocab_size, size=examples.inputs.shape)
            return Examples(np.where(examples.inputs == 0, filler, examples.inputs), examples.labels)
        return examples


PREFIX, NEXT_SET, ANSWER, FIRST = 1, 2, 3, 4
"""Ids of set disjointness: start, between the sets, before the answer, and the first id of an element. 0 is the mask."""


def compose_sets(first: Ids, second: Ids, picked: Ids, place: Ids) -> Examples:
    """first [n, a] and second [n, b] as `1 A 2 B 3`; element `picked` [n] of A overwrites element `place` [n] of B.

    The label, at the last position, is the shared element.
    """
    rows, a = first.shape
    b = second.shape[1]
    at = np.arange(rows)
    shared = first[at, picked]
    inputs = np.empty((rows, a + b + 3), dtype=np.int64)
    inputs[:, 0], inputs[:, 1 : a + 1], inputs[:, a + 1] = PREFIX, first, NEXT_SET
    inputs[:, a + 2 : -1], inputs[:, -1] = second, ANSWER
    inputs[at, a + 2 + place] = shared
    labels = blank_labels(rows, a + b + 3)
    labels[:, -1] = shared
    return Examples(inputs, labels)


@dataclass(frozen=True)
class SetDisjointness(Task):
    """Two sets with one common element, which is the answer (JRT, arXiv 2407.05483, Figure 2).

    Elements of A and of B come from two disjoint halves of the ids from 4 on, split again for each example as the authors' code
    does (the paper speaks of fixed halves).
    """

    name: ClassVar[str] = "set_disjointness"
    first: int
    second: int
    vocab_size: int = 2048

    def __post_init__(self) -> None:
        need(min(self.first, self.second) >= 1, self, "sets must not be empty")
        half = self.vocab_size // 2
        need(self.first <= half and self.second <= self.vocab_size - FIRST - half, self, "a set must fit into half of the ids")

    @property
    def rows(self) -> int:
        """V."""
        return self.vocab_size

    @property
    def seq_length(self) -> int:
        """Both sets and three marks."""
        return self.first + self.second + 3

    def draw(self, rng: np.random.Generator, count: int) -> Examples:
        """See the class. Drawing all elements without replacement is drawing each set from its half of a random split."""
        both = distinct(rng, count, self.first + self.second, FIRST, self.vocab_size)
        picked, place = rng.integers(self.first, size=count), rng.integers(self.second, size=count)
        return compose_sets(both[:, : self.first], both[:, self.first :], picked, place)
