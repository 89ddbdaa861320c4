"""A needle in a haystack: one fact somewhere in a long text of no interest, asked for at its end; in ids and in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from megatron.data.tokenizer_base import Tokenizer
from megatron.synthetics.task import Examples, Ids, Task, blank_labels, distinct, need

NEEDLE, QUESTION, FIRST = 1, 2, 3
"""Ids of the number form: before a needle, before the question, and the first id of a key. 0 is not used."""


@dataclass(frozen=True)
class NeedleNumbers(Task):
    """`needles` times `1 key v1 .. vd` among random ids, then `2 key v1 .. vd` for one of them; the value is asked for.

    Keys are the lower half of the ids from 3 on, all different; values (`digits` tokens) and haystack come from the upper half.
    Needles begin at multiples of digits + 2. `depth` places the one asked for, from 0 (start) to 1 (end); negative: anywhere.
    """

    name: ClassVar[str] = "needle"
    length: int
    vocab_size: int = 256
    needles: int = 1
    digits: int = 1
    depth: float = -1.0

    def __post_init__(self) -> None:
        need(self.digits >= 1 and self.needles >= 1, self, "needles and digits must be at least 1")
        need(self._slots >= self.needles, self, "needles and question must fit into length")
        need(self.first_value - FIRST >= self.needles and self.vocab_size > self.first_value, self, "vocab_size is too small")
        need(self.depth <= 1, self, "depth is at most 1")

    @property
    def _slots(self) -> int:
        return (self.length - self.digits - 1) // (self.digits + 2)

    @property
    def first_value(self) -> int:
        """The first id of values and haystack; keys are below."""
        return FIRST + (self.vocab_size - FIRST) // 2

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
        keys = distinct(rng, count, self.needles, FIRST, self.first_value)
        values = rng.integers(self.first_value, self.vocab_size, size=(count, self.needles, self.digits))
        hay = rng.integers(self.first_value, self.vocab_size, size=(count, self.length))
        slots = distinct(rng, count, self.needles, 0, self._slots)
        if self.depth >= 0:
            target = round(self.depth * (self._slots - 1))
            # The needle in the target slot changes places with the first one.
            slots = np.where(slots == target, slots[:, :1], slots)
            slots[:, 0] = target
        return compose_needles(keys, values, slots, hay)


def compose_needles(keys: Ids, values: Ids, slots: Ids, hay: Ids) -> Examples:
    """Needle 0 is the one that is asked for.

    Args:
        keys: [n, m]. values: [n, m, d]. slots: [n, m], needle i begins at slot * (d + 2). hay: [n, s], what stands elsewhere.
    """
    rows, length = hay.shape
    digits = values.shape[2]
    inputs, labels, at = hay.copy(), blank_labels(rows, length), np.arange(rows)
    for i in range(keys.shape[1]):
        start = slots[:, i] * (digits + 2)
        inputs[at, start], inputs[at, start + 1] = NEEDLE, keys[:, i]
        for j in range(digits):
            inputs[at, start + 2 + j] = values[:, i, j]
    end = length - digits - 1
    inputs[:, end], inputs[:, end + 1] = QUESTION, keys[:, 0]
    inputs[:, end + 2 :] = values[:, 0, :-1]
    labels[:, end + 1 :] = values[:, 0]
    return Examples(inputs, labels)


_WHO = ("The baker", "An old sailor", "Our neighbour", "The teacher", "A young doctor", "The gardener", "Her uncle", "A clerk")
_DID = ("repaired", "painted", "looked for", "forgot about", "talked of", "paid for", "carried away", "admired", "described")
_WHAT = ("the wooden door", "a small boat", "two heavy books", "the garden wall", "a letter from abroad", "the morning train")
_WHEN = ("before breakfast", "in the rain", "last winter", "without a word", "on the way home", "after the meeting", "at night")
_CITIES = ("Aldenburg", "Brixholm", "Corvane", "Dunmere", "Elsworth", "Farrow", "Glenhaven", "Harrowgate", "Istria", "Kelso")


@dataclass(frozen=True)
class NeedleText(Task):
    """`The pass key of CITY is NUMBER.` between sentences of no interest; at the end the number is asked for.

    Attributes:
        length: tokens; the haystack is cut at its beginning so that the example has exactly as many.
        digits: of the number.
        depth: as in `NeedleNumbers`; the needle is put at the nearest end of a sentence.
    """

    name: ClassVar[str] = "needle_text"
    reads_text: ClassVar[bool] = True
    length: int
    digits: int = 5
    depth: float = -1.0
    tokenizer: Tokenizer | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        need(self.digits >= 1 and self.depth <= 1, self, "digits must be at least 1 and depth at most 1")
        need(self.tokenizer is not None, self, "it is made of words: a tokenizer is needed (tokenizer_type)")

    @property
    def rows(self) -> int:
        """The tokenizer's vocabulary."""
        assert self.tokenizer is not None
        return self.tokenizer.vocab_size

    @property
    def seq_length(self) -> int:
        """As asked for."""
        return self.length

    def draw(self, rng: np.random.Generator, count: int) -> Examples:
        """See the class; one example at a time, as its needle has to be tokenized."""
        tokenizer = self.tokenizer
        assert tokenizer is not None
        picks = rng.integers([len(_WHO), len(_DID), len(_WHAT), len(_WHEN)], size=(64, 4))
        hay = [" ".join((_WHO[a], _DID[b], _WHAT[c], _WHEN[d])) + ". " for a, b, c, d in picks]
        sentences = [np.array(tokenizer.tokenize_piece(text), dtype=np.int64) for text in hay]
        inputs, labels = np.zeros((count, self.length), dtype=np.int64), blank_labels(count, self.length)
        for row in range(count):
            city = _CITIES[int(rng.integers(len(_CITIES)))]
            number = "".join(map(str, rng.integers(10, size=self.digits)))
            depth = self.depth if self.depth >= 0 else float(rng.random())
            parts = (f"The pass key of {city} is {number}. ", f"What is the pass key of {city}? It is", f" {number}")
            needle, question, answer = (np.array(tokenizer.tokenize_piece(part), dtype=np.int64) for part in parts)
            missing = self.length + 1 - len(needle) - len(question) - len(answer)
            need(missing >= 0, self, f"needle and question alone are {self.length + 1 - missing} tokens")
            text = np.concatenate([_haystack(rng, sentences, missing, depth, needle), question, answer])
            inputs[row] = text[:-1]
            labels[row, self.length - len(answer) :] = answer
        return Examples(inputs, labels)


def _haystack(rng: np.random.Generator, sentences: list[Ids], size: int, depth: float, needle: Ids) -> Ids:
    """`size` tokens of random sentences, cut at the front, with the needle at the sentence end nearest to `depth`."""
    chosen: list[Ids] = []
    have = 0
    while have < size:
        chosen.append(sentences[int(rng.integers(len(sentences)))])
        have += len(chosen[-1])
    if not chosen:
        return needle
    text = np.concatenate(chosen)[have - size :]
    ends = np.cumsum([0] + [len(s) for s in chosen]) - (have - size)
    ends[0] = 0
    at = int(ends[np.argmin(np.abs(ends - depth * size))])
    return np.concatenate([text[:at], needle, text[at:]])
