"""State tracking: products in a finite group, and arithmetic modulo a number, for lengths beyond the trained one.

The product of a sequence of permutations needs a state that changes with every token. For a group that is not solvable (S5, A5)
the problem is complete for NC1, out of reach of a fixed number of layers of linear recurrences with diagonal transitions and of
attention (Merrill et al., arXiv 2404.08819); parity needs transitions with negative values (Grazzi et al., arXiv 2411.12537).
Modular arithmetic, with and without brackets, is the task of Deletang et al. (arXiv 2207.02098).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from megatron.synthetics.task import Examples, Ids, Task, blank_labels, need

ANSWERS = ("all", "last")
_LARGEST_CYCLE, _DEGREES = 512, range(3, 7)


@functools.lru_cache(maxsize=8)
def group_table(name: str) -> Ids:
    """[g, g]: the element that results from element a followed by element b; element 0 changes nothing.

    Args:
        name: `parity`, `zN` (the integers modulo N), `sN` or `aN` (all, or the even, permutations of N things).

    Raises:
        ValueError: there is no such group, or it is too large.
    """
    name = "z2" if name == "parity" else name
    kind, degree = name[:1], int(name[1:]) if name[1:].isdecimal() and len(name) < 5 else 0
    if kind == "z" and 2 <= degree <= _LARGEST_CYCLE:
        numbers = np.arange(degree)
        return np.asarray((numbers[:, None] + numbers) % degree, dtype=np.int64)
    if kind not in ("s", "a") or degree not in _DEGREES:
        raise ValueError(f"group is parity, z2 to z{_LARGEST_CYCLE}, s3 to s6 or a3 to a6, not '{name}'")
    elements = np.array(list(itertools.permutations(range(degree))), dtype=np.int64)
    if kind == "a":
        inversions = sum(elements[:, i] > elements[:, j] for i in range(degree) for j in range(i + 1, degree))
        elements = elements[inversions % 2 == 0]
    # a followed by b sends i to b[a[i]]; permutations in lexicographic order are found by their digits
    weights = (degree + 1) ** np.arange(degree - 1, -1, -1)
    composed = elements[np.arange(len(elements))[None, :, None], elements[:, None, :]]
    return np.searchsorted(elements @ weights, composed @ weights).astype(np.int64)


@dataclass(frozen=True)
class StateTracking(Task):
    """Random elements of a group; the answer at a position is the product of all elements up to it.

    Attributes:
        length: elements of an example.
        group: see `group_table`; ids are the numbers of its elements.
        answer: `all` asks at every position, `last` at the last one.
    """

    name: ClassVar[str] = "state_tracking"
    length: int
    group: str = "s5"
    answer: str = "all"

    def __post_init__(self) -> None:
        need(self.length >= 1, self, "length must be at least 1")
        need(self.answer in ANSWERS, self, "answer is all or last")
        try:
            group_table(self.group)
        except ValueError as error:
            need(False, self, str(error))

    @property
    def rows(self) -> int:
        """Elements of the group."""
        return len(group_table(self.group))

    @property
    def seq_length(self) -> int:
        """As asked for."""
        return self.length

    def draw(self, rng: np.random.Generator, count: int) -> Examples:
        """See the class."""
        table = group_table(self.group)
        inputs = rng.integers(len(table), size=(count, self.length))
        products, state = np.empty_like(inputs), np.zeros(count, dtype=np.int64)
        for place in range(self.length):
            state = table[state, inputs[:, place]]
            products[:, place] = state
        labels = products if self.answer == "all" else blank_labels(count, self.length)
        labels[:, -1] = products[:, -1]
        return Examples(inputs, labels)


PLUS, MINUS, TIMES, OPEN, CLOSE, EQUALS = range(6)
"""Ids after those of the numbers 0 to modulus - 1."""


@dataclass(frozen=True)
class ModularArithmetic(Task):
    """`3 + 2 * 4 - 1 =` modulo a number; products before sums. The answer is asked for at the last mark.

    Attributes:
        length: tokens of an example with its mark: an even number, with brackets 4 j + 2.
        modulus: numbers are below it.
        brackets: every operation is enclosed in brackets, as `( ( 3 + 2 ) * 4 ) =`, nested at random.
        answer: `all` asks for the value so far at every number too; without brackets only.
    """

    name: ClassVar[str] = "modular_arithmetic"
    length: int
    modulus: int = 5
    brackets: bool = False
    answer: str = "last"

    def __post_init__(self) -> None:
        need(2 <= self.modulus <= _LARGEST_CYCLE, self, f"modulus is 2 to {_LARGEST_CYCLE}")
        need(self.answer in ANSWERS, self, "answer is all or last")
        need(not (self.brackets and self.answer == "all"), self, "within brackets there is no value so far: answer is last")
        if self.brackets:
            need(
                self.length % 4 == 2,
                self,
                "with brackets length is 4 j + 2: 4 more tokens per operation, a number and the mark",
            )
        need(self.length >= 2 and self.length % 2 == 0, self, "length is even: numbers, signs between them and the mark")

    @property
    def rows(self) -> int:
        """Numbers, signs, brackets and the mark."""
        return self.modulus + 6

    @property
    def seq_length(self) -> int:
        """As asked for."""
        return self.length

    def draw(self, rng: np.random.Generator, count: int) -> Examples:
        """See the class."""
        operations = (self.length - 2) // (4 if self.brackets else 2)
        numbers = rng.integers(self.modulus, size=(count, operations + 1))
        signs = rng.integers(PLUS, TIMES + 1, size=(count, operations))
        if self.brackets:
            return self._nested(numbers, signs, rng.random((count, operations)))
        inputs, labels = np.empty((count, self.length), dtype=np.int64), blank_labels(count, self.length)
        inputs[:, 0::2], inputs[:, 1:-1:2], inputs[:, -1] = numbers, signs + self.modulus, EQUALS + self.modulus
        total, term = np.zeros(count, dtype=np.int64), numbers[:, 0]
        values = [term]
        for place in range(operations):
            sign, number = signs[:, place], numbers[:, place + 1]
            total = np.where(sign == TIMES, total, (total + term) % self.modulus)
            term = np.select([sign == TIMES, sign == MINUS], [term * number % self.modulus, -number], number)
            values.append((total + term) % self.modulus)
        if self.answer == "all":
            labels[:, 0::2] = np.stack(values, axis=1)
        labels[:, -1] = values[-1]
        return Examples(inputs, labels)

    def _nested(self, numbers: Ids, signs: Ids, cuts: NDArray[np.float64]) -> Examples:
        """Examples of the numbers and signs in reading order; `cuts` [n, operations] in [0, 1) choose outermost operations."""
        inputs, labels = np.empty((len(numbers), self.length), dtype=np.int64), blank_labels(len(numbers), self.length)
        mark = {name: self.modulus + name for name in (OPEN, CLOSE, EQUALS)}
        for row, (values, operators, cut) in enumerate(zip(numbers.tolist(), signs.tolist(), cuts.tolist(), strict=True)):
            tokens: list[int] = []
            combine = _Combine(self.modulus, values, operators, iter(cut), tokens)
            labels[row, -1] = combine(0, len(values))
            inputs[row] = [*tokens, mark[EQUALS]]
        return Examples(inputs, labels)


@dataclass(frozen=True)
class _Combine:
    """Writes a bracketed expression token by token and evaluates it."""

    modulus: int
    values: list[int]
    operators: list[int]
    cuts: Iterator[float]
    tokens: list[int]

    def __call__(self, first: int, end: int) -> int:
        """Append the expression of the numbers `first` to `end` - 1; its value."""
        if end - first == 1:
            self.tokens.append(self.values[first])
            return self.values[first]
        at = first + int(next(self.cuts) * (end - first - 1))  # the operation after number `at` is the outermost one
        self.tokens.append(self.modulus + OPEN)
        left = self(first, at + 1)
        self.tokens.append(self.modulus + self.operators[at])
        right = self(at + 1, end)
        self.tokens.append(self.modulus + CLOSE)
        result = {PLUS: left + right, MINUS: left - right, TIMES: left * right}[self.operators[at]]
        return result % self.modulus
