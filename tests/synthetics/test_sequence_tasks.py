"""ListOps, state tracking, modular arithmetic: answers again by independent code, lengths, balance, refused parameters."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from megatron.errors import ConfigError
from megatron.synthetics.dataset import TASKS, SyntheticDataset, read_slices
from megatron.synthetics.listops import ASK, CLOSE, DIGIT, MAX, SM, WORDS, ListOps
from megatron.synthetics.state_tracking import ModularArithmetic, StateTracking, group_table
from megatron.synthetics.task import Ids, checked

X = -100


def listops_value(words: list[str]) -> tuple[int, int]:
    """Value and depth of an expression, by a stack of lists."""
    stack: list[list[Any]] = [["", 0]]
    for word in words:
        if word.startswith("["):
            stack.append([word[1:], 0])
        elif word == "]":
            operator, below, *values = stack.pop()
            ordered, middle = sorted(values), len(values) / 2
            value = {
                "MAX": ordered[-1],
                "MIN": ordered[0],
                "MED": int((ordered[int(middle - 0.5)] + ordered[int(middle)]) / 2),
                "SM": int(str(sum(values))[-1]),
            }[operator]
            stack[-1].append(value)
            stack[-1][1] = max(stack[-1][1], below + 1)
        else:
            stack[-1].append(int(word))
    ((_, depth, value),) = stack
    return value, depth


@pytest.mark.parametrize(
    "task",
    [
        ListOps(length=64, min_length=8, max_depth=4, max_args=5),
        ListOps(length=24, min_length=4, max_depth=2),
        ListOps(400, 100),
    ],
    ids=lambda t: str(t.length),
)
def test_listops_answers(task: ListOps) -> None:
    made = task.draw(np.random.default_rng(1), 300)
    depths, operators, arguments = set(), set(), set()
    for read, labels in zip(made.inputs.tolist(), made.labels.tolist(), strict=True):
        end = read.index(ASK)
        words = [WORDS[i] for i in read[:end]]
        value, depth = listops_value(words)
        assert labels == [X] * end + [value + DIGIT] + [X] * (task.length - end - 1) and WORDS[labels[end]] == str(value)
        assert task.min_length <= end < task.length and not any(read[end + 1 :]), "padded after the mark"
        assert words.count("]") == sum(word[0] == "[" for word in words), "one bracket closes each operator"
        depths.add(depth)
        operators |= {word for word in words if word[0] == "["}
        arguments |= _arguments(words)
    assert max(depths) <= task.max_depth and len(depths) > 1 and operators == {"[MAX", "[MIN", "[MED", "[SM"}
    assert min(arguments) == 2 and max(arguments) == task.max_args


def _arguments(words: list[str]) -> set[int]:
    counts, found = [0], set()
    for word in words:
        if word[0] == "[":
            counts.append(0)
        else:
            if word == "]":
                found.add(counts.pop())
            counts[-1] += 1
    return found


def test_listops_of_the_benchmark() -> None:
    """Expressions of 500 to 2,047 tokens with lists in lists; no digit has more than a quarter of the answers."""
    made = ListOps().draw(np.random.default_rng(2), 200)
    sizes = (made.inputs == ASK).argmax(1)
    assert sizes.min() >= 500 and sizes.max() < 2048 and sizes.max() > 1200
    for read, labels in zip(made.inputs[:20].tolist(), made.labels[:20], strict=True):
        end = read.index(ASK)
        value, depth = listops_value([WORDS[i] for i in read[:end]])
        assert labels[end] == value + DIGIT and 3 < depth <= 10
    answers = np.bincount(made.labels[made.labels >= 0] - DIGIT, minlength=10)
    assert answers.sum() == 200 and answers.min() > 0 and answers.max() < 50


def test_listops_answers_are_balanced() -> None:
    made = ListOps(64, 8, 4, 5).draw(np.random.default_rng(3), 4000)
    shares = np.bincount(made.labels[made.labels >= 0] - DIGIT, minlength=10) / 4000
    assert shares.min() > 0.05 and shares.max() < 0.15, shares
    first = np.bincount(made.inputs[:, 0], minlength=SM + 1)[MAX:] / 4000
    assert np.abs(first - 0.25).max() < 0.04 and (made.inputs != CLOSE).any()


def products(name: str) -> list[tuple[int, ...]]:
    """The elements in the order of their ids, of permutation groups."""
    degree, even = int(name[1]), name[0] == "a"
    elements = itertools.permutations(range(degree))
    return [p for p in elements if not even or sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0]


@pytest.mark.parametrize(("name", "size"), [("s3", 6), ("s5", 120), ("a5", 60), ("s4", 24), ("a4", 12)])
def test_products_of_permutations(name: str, size: int) -> None:
    """Five things are moved by one permutation after the other."""
    elements = products(name)
    made = StateTracking(12, name).draw(np.random.default_rng(4), 40)
    assert len(elements) == size == StateTracking(1, name).rows
    for read, labels in zip(made.inputs, made.labels, strict=True):
        places = list(range(int(name[1])))  # where each thing is
        for token, label in zip(read, labels, strict=True):
            places = [elements[token][place] for place in places]
            assert elements[label] == tuple(places)


@pytest.mark.parametrize(("name", "modulus"), [("parity", 2), ("z2", 2), ("z7", 7)])
def test_sums_modulo_a_number(name: str, modulus: int) -> None:
    made = StateTracking(30, name).draw(np.random.default_rng(5), 20)
    assert made.inputs.max() == modulus - 1 and (made.labels == np.cumsum(made.inputs, axis=1) % modulus).all()
    last = StateTracking(30, name, "last").draw(np.random.default_rng(5), 20)
    assert (last.inputs == made.inputs).all() and (last.labels[:, -1] == made.labels[:, -1]).all()
    assert (last.labels[:, :-1] == X).all()


@pytest.mark.parametrize("name", ["s3", "a5", "s5", "z12"])
def test_groups_are_groups(name: str) -> None:
    table = group_table(name)
    everything = np.arange(len(table))
    assert (table[0] == everything).all() and (table[:, 0] == everything).all(), "element 0 changes nothing"
    assert (np.sort(table, axis=0) == everything[:, None]).all() and (np.sort(table, axis=1) == everything).all()
    a, b, c = np.random.default_rng(6).integers(len(table), size=(3, 500))
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()
    assert (table == table.T).all() == name.startswith("z")


def test_answers_in_a_group_are_balanced() -> None:
    made = StateTracking(64, "s3").draw(np.random.default_rng(7), 2000)
    shares = np.bincount(made.labels[:, 1:].ravel(), minlength=6) / made.labels[:, 1:].size
    assert np.abs(shares - 1 / 6).max() < 0.01


def text_of(tokens: Ids, modulus: int) -> str:
    return " ".join(str(i) if i < modulus else "+-*()="[i - modulus] for i in tokens.tolist())


@pytest.mark.parametrize(("length", "brackets"), [(2, False), (12, False), (40, False), (2, True), (6, True), (62, True)])
def test_arithmetic_by_pythons_own(length: int, brackets: bool) -> None:
    task = ModularArithmetic(length, 5, brackets)
    made = task.draw(np.random.default_rng(8), 100)
    shapes = set()
    for read, labels in zip(made.inputs, made.labels, strict=True):
        text = text_of(read, 5)
        assert text.endswith(" =") and labels[-1] == eval(text[:-2]) % 5 and (labels[:-1] == X).all()
        shapes.add("".join(c for c in text if c in "()"))
    assert (len(shapes) > 50) == (length == 62), "expressions are nested at random"
    values = np.bincount(made.labels[:, -1], minlength=5)
    assert values.min() > 0 and values.max() < 60


def test_arithmetic_so_far() -> None:
    made = ModularArithmetic(20, 7, answer="all").draw(np.random.default_rng(9), 50)
    for read, labels in zip(made.inputs, made.labels, strict=True):
        for place in range(0, 20, 2):
            assert labels[place] == eval(text_of(read[: place + 1], 7)) % 7
        assert labels[-1] == labels[-2] and (labels[1:-1:2] == X).all()


SPECS: list[dict[str, Any]] = [
    {"task": "listops", "length": 32, "min_length": 4, "train": [{"examples": 40}], "test": [{"examples": 40}]},
    {"task": "state_tracking", "length": 40, "train": [{"examples": 40}], "test": [{"examples": 40}]},
    {"task": "modular_arithmetic", "length": 62, "brackets": True, "train": [{"examples": 40}], "test": [{"examples": 40}]},
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s["task"])
def test_examples_follow_from_the_seed(spec: dict[str, Any]) -> None:
    def rows(split: str, seed: int) -> Ids:
        return SyntheticDataset(read_slices(spec, split), seed, split, 8).stores[0].rows(np.arange(40)).inputs

    assert (rows("train", 1) == rows("train", 1)).all()
    for other in (rows("train", 2), rows("test", 1)):
        shared = {row.tobytes() for row in other} & {row.tobytes() for row in rows("train", 1)}
        assert len(shared) <= (2 if spec["task"] == "listops" else 0), "a list of two digits may occur twice"


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("listops", {"length": 100, "min_length": 100}, "min_length < length"),
        ("listops", {"max_depth": 2}, "no expression of min_length"),
        ("listops", {"max_args": 1}, "2 arguments"),
        ("listops", {"operator_rate": 1.5}, "probability"),
        ("state_tracking", {"length": 8, "group": "s9"}, "not 's9'"),
        ("state_tracking", {"length": 8, "group": "m11"}, "not 'm11'"),
        ("state_tracking", {"length": 8, "answer": "first"}, "all or last"),
        ("state_tracking", {"group": "s5"}, "length"),
        ("modular_arithmetic", {"length": 7}, "even"),
        ("modular_arithmetic", {"length": 8, "brackets": True}, "4 j + 2"),
        ("modular_arithmetic", {"length": 10, "brackets": True, "answer": "all"}, "no value so far"),
        ("modular_arithmetic", {"length": 10, "modulus": 1}, "modulus"),
    ],
)
def test_parameters_that_cannot_be(name: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked(TASKS[name], values)
    assert message in str(caught.value)


def test_a_length_that_next_to_no_expression_has() -> None:
    with pytest.raises(ConfigError, match="no listops example") as caught:
        ListOps(length=600, min_length=599, max_depth=10, max_args=10, operator_rate=0.01).draw(np.random.default_rng(0), 2)
    assert "trees have 599 to 599 tokens" in str(caught.value)
