"""ListOps as in Long Range Arena (arXiv 2011.04006; Nangia & Bowman, arXiv 1804.06028): nested lists of digits, answer a digit.

    [MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ] = 5

All trees of a block are drawn together, level by level: the nodes of a level lie one after the other in the order of their
parents, so that a level is evaluated and laid out by segment-wise reductions, without a loop over examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from megatron.errors import ConfigError
from megatron.synthetics.task import Examples, Ids, Mask, Task, blank_labels, need

DIGIT, MAX, MIN, MED, SM, CLOSE, ASK, ROWS = 1, 11, 12, 13, 14, 15, 16, 17
"""Ids: digit d is d + 1, then opening operators, the closing bracket and the mark at which the answer is asked for; 0 pads."""
WORDS = ("_", *map(str, range(10)), "[MAX", "[MIN", "[MED", "[SM", "]", "=")
"""Text of each id."""
_ROUNDS = 400


@dataclass
class _Level:
    """Nodes of one depth of all trees.

    Attributes:
        tree: [n], the tree of each node.
        operator: [n], its id, 0 for a digit.
        value: [n], of a digit; of an operator once its arguments are known.
        children: [n], arguments of an operator, which are the next level's nodes in the same order; 0 for a digit.
        size: [n], tokens of the subtree.
    """

    tree: Ids
    operator: Ids
    value: Ids
    children: Ids
    size: Ids


@dataclass(frozen=True)
class ListOps(Task):
    """Expressions of MAX, MIN, MED (median, rounded down) and SM (sum modulo 10) over digits and lists.

    Attributes:
        length: tokens of an example: at most length - 1 of the expression, then the mark. Shorter ones are padded after it.
        min_length: tokens of the shortest expression; others are drawn again.
        max_depth: operators around the innermost digit.
        max_args: an operator has 2 to max_args arguments.
        operator_rate: probability that an argument is a list; 0.25 as in the benchmark's generator.
    """

    name: ClassVar[str] = "listops"
    length: int = 2048
    min_length: int = 500
    max_depth: int = 10
    max_args: int = 10
    operator_rate: float = 0.25

    def __post_init__(self) -> None:
        need(self.max_depth >= 1 and self.max_args >= 2, self, "an operator has at least 2 arguments and a depth of 1")
        need(4 <= self.min_length < self.length, self, "4 <= min_length < length: a list has 4 tokens, the mark is one more")
        need(0 <= self.operator_rate <= 1, self, "operator_rate is a probability")
        longest = 1
        for _ in range(self.max_depth if self.operator_rate > 0 else 1):
            longest = min(2 + self.max_args * longest, self.length)
        need(longest >= self.min_length, self, "max_depth and max_args allow no expression of min_length tokens")

    @property
    def rows(self) -> int:
        """Digits, operators, bracket, mark and padding."""
        return ROWS

    @property
    def seq_length(self) -> int:
        """As asked for."""
        return self.length

    def draw(self, rng: np.random.Generator, count: int) -> Examples:
        """See the class.

        Raises:
            ConfigError: next to no tree has a length between min_length and length.
        """
        inputs, labels, done = np.zeros((count, self.length), dtype=np.int64), blank_labels(count, self.length), 0
        for _ in range(_ROUNDS):
            levels = self._grow(rng, count)
            evaluate(levels)
            sizes = levels[0].size
            chosen = np.flatnonzero((sizes >= self.min_length) & (sizes < self.length) & self._complete(levels, count))
            chosen = chosen[: count - done]
            rows = np.arange(done, done + len(chosen))
            row_of = np.full(count, -1)
            row_of[chosen] = rows
            write_tokens(levels, row_of, inputs)
            inputs[rows, sizes[chosen]] = ASK
            labels[rows, sizes[chosen]] = levels[0].value[chosen] + DIGIT
            done += len(chosen)
            if done == count:
                return Examples(inputs, labels)
        raise ConfigError(
            "no listops example can be made",
            where=str(self.parameters()),
            why=f"{done} of {_ROUNDS * count:,} trees have {self.min_length} to {self.length - 1} tokens",
            hint="lower min_length, or raise length, max_depth or operator_rate",
        )

    def _grow(self, rng: np.random.Generator, count: int) -> list[_Level]:
        """`count` trees from the root; a tree that is too long already grows no further."""
        levels, tree = [], np.arange(count)
        tokens = np.zeros(count, dtype=np.int64)
        for depth in range(self.max_depth + 1):
            nodes = len(tree)
            is_list: Mask = np.ones(nodes, dtype=bool) if depth == 0 else rng.random(nodes) < self.operator_rate
            is_list &= depth < self.max_depth
            operator = np.where(is_list, rng.integers(MAX, SM + 1, size=nodes), 0)
            children = np.where(is_list, rng.integers(2, self.max_args + 1, size=nodes), 0)
            tokens += np.bincount(tree, weights=1 + is_list, minlength=count).astype(np.int64)
            children[tokens[tree] >= self.length] = 0
            levels.append(_Level(tree, operator, rng.integers(10, size=nodes), children, np.ones(nodes, dtype=np.int64)))
            tree = np.repeat(tree, children)
        return levels

    @staticmethod
    def _complete(levels: list[_Level], count: int) -> Mask:
        """[count]: no operator of the tree lacks its arguments."""
        whole = np.ones(count, dtype=bool)
        for level in levels:
            whole[level.tree[(level.operator > 0) & (level.children == 0)]] = False
        return whole


def evaluate(levels: list[_Level]) -> None:
    """Fill in the values and sizes of operators from the deepest level upwards."""
    for level, below in zip(levels[-2::-1], levels[:0:-1], strict=True):
        at = np.flatnonzero(level.children)
        if not len(at):
            continue
        counts = level.children[at]
        starts = np.cumsum(counts) - counts
        ordered = below.value[np.lexsort((below.value, np.repeat(np.arange(len(at)), counts)))]
        low, high = ordered[starts + (counts - 1) // 2], ordered[starts + counts // 2]
        results: dict[int, NDArray[np.int64]] = {
            MAX: ordered[starts + counts - 1],
            MIN: ordered[starts],
            MED: (low + high) // 2,
            SM: np.add.reduceat(below.value, starts) % 10,
        }
        for operator, values in results.items():
            here = level.operator[at] == operator
            level.value[at[here]] = values[here]
        level.size[at] = 2 + np.add.reduceat(below.size, starts)


def write_tokens(levels: list[_Level], row_of: Ids, inputs: Ids) -> None:
    """Write the expressions of trees with row_of[tree] >= 0 into these rows of `inputs`, from the first column on."""
    start = np.zeros(len(levels[0].tree), dtype=np.int64)
    for number, level in enumerate(levels):
        row, is_list = row_of[level.tree], level.operator > 0
        used = row >= 0
        inputs[row[used], start[used]] = np.where(is_list, level.operator, level.value + DIGIT)[used]
        closed = used & is_list
        inputs[row[closed], (start + level.size - 1)[closed]] = CLOSE
        counts = level.children[level.children > 0]
        if len(counts):
            sizes = levels[number + 1].size
            before = np.cumsum(sizes) - sizes  # tokens of all nodes to the left, also those of other parents
            first = np.cumsum(counts) - counts
            start = np.repeat(start[level.children > 0] + 1, counts) + before - np.repeat(before[first], counts)
        else:
            start = np.zeros(0, dtype=np.int64)
