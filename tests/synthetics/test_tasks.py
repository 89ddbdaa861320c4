"""Synthetic tasks: worked examples by hand, Zoology's own arrays from its random numbers, and what holds for every example."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.data.tokenizers import CharLevelTokenizer, build_tokenizer
from megatron.errors import ConfigError
from megatron.synthetics.dataset import TASKS
from megatron.synthetics.mad import FuzzyRecall, Memorization, SelectiveCopy, compose_recall
from megatron.synthetics.needle import NEEDLE, QUESTION, NeedleNumbers, compose_needles
from megatron.synthetics.recall import MultiQueryRecall, SetDisjointness, compose_mqar, compose_sets
from megatron.synthetics.task import Examples, Ids, checked, distinct, first_places, weighted_distinct
from tests.data.hf_files import around, write

X = -100


def ids(*rows: list[int]) -> Ids:
    return np.array(rows, dtype=np.int64)


def same(examples: Examples, inputs: list[int], labels: list[int]) -> None:
    assert examples.inputs.tolist() == [inputs] and examples.labels.tolist() == [labels]


def test_mqar_by_hand() -> None:
    """Zoology's own illustration: pairs 2-8 and 4-7 of 12 ids; key 4 in slot 1, key 2 in slot 5, behind a context of four."""
    made = compose_mqar(ids([2, 4]), ids([8, 7]), ids([5, 1]), 16)
    same(
        made,
        [2, 8, 4, 7, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 2, 0],
        [X, X, X, X, X, X, 7, X, X, X, X, X, X, X, 8, X],
    )


def test_set_disjointness_by_hand() -> None:
    """A = {9, 4, 7}, B = {5, 12}; element 2 of A overwrites place 0 of B."""
    made = compose_sets(ids([9, 4, 7]), ids([5, 12]), np.array([2]), np.array([0]))
    same(made, [1, 9, 4, 7, 2, 7, 12, 3], [X, X, X, X, X, X, X, 7])


def test_recall_by_hand() -> None:
    """Key 1 is repeated and keeps its first value; under noise a key was not shown."""
    plain = compose_recall(ids([1, 0, 1, 0]), ids([5, 6, 7, 4]), None)
    same(plain, [1, 5, 0, 6, 1, 5, 0, 6], [X, X, X, X, 5, X, 6, X])
    noise = np.full((1, 4, 2), -1)
    noise[0, 0] = (8, 9)
    noisy = compose_recall(ids([1, 0, 1, 1]), ids([5, 6, 7, 4]), noise)
    same(noisy, [8, 9, 0, 6, 1, 7, 1, 7], [X, X, X, X, X, X, 7, X])


def test_needles_by_hand() -> None:
    """Two needles of two digits in slots 1 and 0; the first is asked for."""
    hay = ids(list(range(50, 64)))
    made = compose_needles(ids([5, 6]), ids([[40, 41], [42, 43]]).reshape(1, 2, 2), ids([1, 0]), hay)
    same(
        made,
        [1, 6, 42, 43, 1, 5, 40, 41, 58, 59, 60, 2, 5, 40],
        [X] * 12 + [40, 41],
    )


# SHA-256 of inputs and labels (little-endian int64) as Zoology's own generator made them (revision d88d6f5, run here).
ZOOLOGY = [
    ((64, 50, 32, 7, 4, 0.01, False), "9d44f1837bac689237ad7b4f2495f081", "848aaf8550e6290a2931b4bdd20670d3"),
    ((8192, 20, 64, 123, 16, 0.01, False), "de32114da7b99bc6b240b304a3c2aa85", "044ea838fc8b73fa59b9012e6d820f3d"),
    ((512, 20, 128, 3, 8, 0.5, False), "6f2d17a4875386c5487f734fcbe57600", "7483e9dc8b9295d108799f97be99cf0e"),
    ((256, 20, 64, 11, 4, 0.01, True), "aa654431665e61512ac6376bf9b4b4dd", "1f8ab852814812cbcdf2bc75c3ee0247"),
]


@pytest.mark.parametrize(("case", "inputs", "labels"), ZOOLOGY, ids=lambda v: str(v)[:16])
def test_the_arrays_of_zoology(case: tuple[Any, ...], inputs: str, labels: str) -> None:
    """Fed with the random numbers that numpy's old generator gives for the same seed, ours composes the same arrays.

    Our own draws have the same distribution and other numbers: one call of numpy's old `choice` per example is what we avoid.
    """
    vocab, count, length, seed, pairs, power, filled = case
    old = np.random.RandomState(seed)
    half, slots = vocab // 2, np.arange(1, (length - 2 * pairs) // 2 + 1)
    weights = power * slots ** (power - 1)
    weights = weights / weights.sum()

    def rows(choose: Callable[[], Ids]) -> Ids:
        return np.stack([choose() for _ in range(count)])

    keys = rows(lambda: old.choice(np.arange(1, half), pairs, replace=False))
    values = rows(lambda: old.choice(np.arange(half, vocab), pairs, replace=False))
    gaps = rows(lambda: old.choice(len(slots), pairs, replace=False, p=weights))
    made = compose_mqar(keys, values, gaps, length)
    read = made.inputs
    if filled:
        torch.manual_seed(5)
        read = np.where(read == 0, torch.randint(vocab, size=read.shape).numpy(), read)
    for array, digest in ((read, inputs), (made.labels, labels)):
        assert hashlib.sha256(np.ascontiguousarray(array.astype("<i8")).tobytes()).hexdigest().startswith(digest)


def test_slots_follow_the_power_law() -> None:
    """With one query its slot has weight a s^(a-1); 20,000 draws: frequencies are within 0.01 of it (3 sigma)."""
    task = MultiQueryRecall(32, 1, 64, power_a=0.3, random_non_queries=False)
    made = task.draw(np.random.default_rng(0), 20_000)
    slots = (np.argmax(made.labels >= 0, axis=1) - 2) // 2
    weights = np.arange(1, 16) ** (0.3 - 1)
    found = np.bincount(slots, minlength=15) / len(slots)
    assert np.abs(found - weights / weights.sum()).max() < 0.01


def test_weighted_draws_are_one_after_the_other() -> None:
    """P(first = i, second = j) = w_i w_j / (1 - w_i), as numpy's own choice draws; 40,000 draws, 3 sigma are below 0.008."""
    w = np.array([0.6, 0.3, 0.1])
    drawn = weighted_distinct(np.random.default_rng(1), 40_000, 2, w)
    found = np.zeros((3, 3))
    np.add.at(found, (drawn[:, 0], drawn[:, 1]), 1 / len(drawn))
    want = w[:, None] * w[None] / (1 - w[:, None]) * (1 - np.eye(3))
    assert np.abs(found - want).max() < 0.008


def test_distinct_is_uniform_over_ordered_choices() -> None:
    drawn = distinct(np.random.default_rng(2), 60_000, 2, 5, 9)
    assert drawn.min() == 5 and drawn.max() == 8 and (drawn[:, 0] != drawn[:, 1]).all()
    counts = np.bincount((drawn[:, 0] - 5) * 4 + drawn[:, 1] - 5, minlength=16).reshape(4, 4) / len(drawn)
    assert np.abs(counts - (1 - np.eye(4)) / 12).max() < 0.005
    assert (np.sort(distinct(np.random.default_rng(3), 5, 4, 5, 9), axis=1) == np.arange(5, 9)).all()


def test_first_places() -> None:
    assert first_places(ids([4, 2, 4, 4, 2, 9])).tolist() == [[0, 1, 0, 0, 1, 5]]


GRID: list[tuple[str, dict[str, Any]]] = [
    ("mqar", {"length": 32, "pairs": 8, "vocab_size": 64}),
    ("mqar", {"length": 16, "pairs": 2, "vocab_size": 40, "random_non_queries": False, "power_a": 1.0}),
    ("set_disjointness", {"first": 3, "second": 9, "vocab_size": 40}),
    ("set_disjointness", {"first": 9, "second": 1, "vocab_size": 64}),
    ("needle", {"length": 40, "digits": 3, "needles": 3, "vocab_size": 32}),
    ("needle_text", {"length": 200, "digits": 4}),
    ("in_context_recall", {"length": 24}),
    ("noisy_recall", {"length": 24, "noise": 0.5}),
    ("fuzzy_recall", {"length": 30}),
    ("fuzzy_recall", {"length": 40, "full_keys": True, "vocab_size": 20}),
    ("memorization", {"length": 12, "vocab_size": 21}),
    ("selective_copy", {"length": 24, "tokens": 5}),
    ("compression", {"length": 13}),
]


@pytest.mark.parametrize(("name", "values"), GRID, ids=lambda v: str(v)[:40])
def test_every_example_is_well_formed(name: str, values: dict[str, Any]) -> None:
    kind = TASKS[name]
    task = checked(kind, values, **({"tokenizer": CharLevelTokenizer()} if kind.reads_text else {}))
    made = task.draw(np.random.default_rng(4), 40)
    assert made.inputs.shape == made.labels.shape == (40, task.seq_length)
    assert made.inputs.dtype == made.labels.dtype == np.int64
    assert made.inputs.min() >= 0 and made.inputs.max() < task.rows
    asked = made.labels != X
    assert asked.any(axis=1).all() and made.labels[asked].min() >= 0 and made.labels.max() < task.rows
    again = task.draw(np.random.default_rng(4), 40)
    assert (again.inputs == made.inputs).all() and (again.labels == made.labels).all()


@pytest.mark.parametrize("pairs", [1, 3, 8])
def test_mqar_answers_stand_in_the_context(pairs: int) -> None:
    made = MultiQueryRecall(32, pairs, 64).draw(np.random.default_rng(pairs), 60)
    for read, labels in zip(made.inputs, made.labels, strict=True):
        keys, values = read[0 : 2 * pairs : 2], read[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert keys.min() >= 1 and keys.max() < 32 <= values.min()
        places = np.flatnonzero(labels >= 0)
        assert len(places) == pairs and places.min() >= 2 * pairs and (places % 2 == 0).all()
        of = dict(zip(keys.tolist(), values.tolist(), strict=True))
        assert all(of[int(read[at])] == labels[at] for at in places), "each key is asked for once, at its own place"
        assert {int(read[at]) for at in places} == set(of)


def test_sets_share_one_element() -> None:
    made = SetDisjointness(5, 7, 64).draw(np.random.default_rng(0), 200)
    for read, labels in zip(made.inputs, made.labels, strict=True):
        first, second = set(read[1:6].tolist()), set(read[7:14].tolist())
        assert first & second == {labels[-1]} and len(first) == 5 and len(second) == 7 and min(first | second) >= 4


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0, -1.0])
def test_needles_stand_where_they_are_asked_to(depth: float) -> None:
    task = NeedleNumbers(44, 64, 4, 2, depth)
    made = task.draw(np.random.default_rng(5), 80)
    for read, labels in zip(made.inputs, made.labels, strict=True):
        assert read[41] == QUESTION and (read[:41] == NEEDLE).sum() == 4
        starts = [int(at) for at in np.flatnonzero(read[:41] == NEEDLE) if read[at + 1] == read[42]]
        assert len(starts) == 1, "one needle has the key that is asked for"
        assert read[starts[0] + 2 : starts[0] + 4].tolist() == labels[42:].tolist() == [read[43], labels[43]]
        if depth >= 0:
            assert starts[0] == 4 * round(depth * 9)


def test_the_text_needle_reads_as_text() -> None:
    tokenizer = CharLevelTokenizer()
    task = checked(TASKS["needle_text"], {"length": 260, "depth": 0.5}, tokenizer=tokenizer)
    made = task.draw(np.random.default_rng(6), 5)
    for read, labels in zip(made.inputs, made.labels, strict=True):
        text, answer = tokenizer.detokenize(read), tokenizer.detokenize(labels[labels >= 0])
        city = text.split("What is the pass key of ")[1].split("?")[0]
        assert f"The pass key of {city} is{answer}. " in text and text.endswith(answer[:-1])
        assert 60 < text.index("The pass key of") < 190


def test_the_text_needle_holds_no_special_tokens(tmp_path: Path) -> None:
    """Its sentences stand in the middle of an example; none of them begins or ends a text."""
    plain, around_it = (
        checked(TASKS["needle_text"], {"length": 120}, tokenizer=build_tokenizer("HFTokenizer", path))
        for path in (write(tmp_path / "plain.json"), write(tmp_path / "t.json", around("<s>", "</s>")))
    )
    made, wanted = (task.draw(np.random.default_rng(6), 5) for task in (around_it, plain))
    assert (made.inputs == wanted.inputs).all() and (made.labels == wanted.labels).all() and made.inputs.max() < 270


def test_motifs_have_one_value_per_key() -> None:
    """In the last pair the key was shown before, and it is answered as then."""
    made = FuzzyRecall(40, 16, 2, 2, full_keys=True).draw(np.random.default_rng(7), 60)
    for read, labels in zip(made.inputs, made.labels, strict=True):
        text = [*read[read != 15].tolist(), int(labels[-1])]
        size = int((labels[-2:] >= 0).sum())
        key, value = text[-size - 2 : -size], text[-size:]
        assert max(key) < 7 <= min(value)
        before = [i for i in range(len(text) - size - 2) if text[i : i + 2] == key and (i == 0 or text[i - 1] >= 7)]
        assert before and text[before[0] + 2 : before[0] + 2 + size] == value


def test_the_learnt_map_is_the_same_in_all_data() -> None:
    seen: dict[int, int] = {}
    for seed in range(3):
        made = Memorization(16, 21).draw(np.random.default_rng(seed), 50)
        for key, value in zip(made.inputs[:, 0::2].ravel().tolist(), made.labels[:, 1::2].ravel().tolist(), strict=True):
            assert seen.setdefault(key, value) == value and value >= 10
    assert len(seen) == 10 and len(set(seen.values())) == 10


def test_copies_keep_the_order() -> None:
    made = SelectiveCopy(30, 16, 6).draw(np.random.default_rng(8), 40)
    for read, labels in zip(made.inputs, made.labels, strict=True):
        assert read[:23][read[:23] < 14].tolist() == labels[24:].tolist() and read[23] == 15 and (read[24:] == 14).all()


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("mqar", {"length": 15, "pairs": 2}, "even"),
        ("mqar", {"length": 16, "pairs": 5}, "4 x pairs"),
        ("mqar", {"length": 64, "pairs": 5, "vocab_size": 64}, "larger than length"),
        ("mqar", {"length": 64, "paris": 5}, "no parameter 'paris'"),
        ("mqar", {"length": "64", "pairs": 5}, "int is expected"),
        ("mqar", {"length": 64}, "pairs"),
        ("set_disjointness", {"first": 30, "second": 2, "vocab_size": 40}, "half of the ids"),
        ("needle", {"length": 10, "needles": 4}, "fit into length"),
        ("needle_text", {"length": 100}, "tokenizer"),
        ("noisy_recall", {"length": 16, "noise": 1.0}, "noise"),
        ("compression", {"length": 12}, "odd"),
    ],
)
def test_parameters_that_cannot_be(name: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked(TASKS[name], values)
    assert message in str(caught.value)
