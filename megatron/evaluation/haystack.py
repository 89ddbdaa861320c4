"""Haystacks: long texts of no interest, in tokens, around the places where needles are put.

Three kinds, as in RULER (arXiv 2404.06654): a few sentences repeated (`NoiseHaystack`), real text (`TextHaystack`: a text
file or the corpus of a run, where RULER takes essays), and needles that nobody asks for (`NeedleHaystack`). It is cut at
its two ends only, so that it has exactly as many tokens as are asked for and a sentence begins exactly at the given token.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.tokenizer_base import Tokenizer
from megatron.errors import DataError
from megatron.synthetics.task import Ids

NOISE = (
    " The river runs past the mill.",
    " Bread is baked before dawn.",
    " Nobody is in a hurry here.",
    " A cart rolls down the lane and comes back up.",
)
TEXT_TOKENS = 1 << 22
_SENTENCE_ENDS = (".", "!", "?", "\n", ";", ":")


@dataclass(frozen=True)
class Tape:
    """A haystack without needles.

    Attributes:
        tokens: [h] ids.
        starts: places between 0 and h where a sentence begins, ascending; h itself is one.
    """

    tokens: Ids
    starts: Ids


class Haystack(ABC):
    """A source of haystacks."""

    @abstractmethod
    def tape(self, rng: np.random.Generator, before: int, after: int) -> Tape:
        """A haystack of `before + after` tokens in which a sentence begins at token `before`."""


def _from_sentences(earlier: Iterator[Sequence[int]], later: Iterator[Sequence[int]], before: int, after: int) -> Tape:
    """Sentences from the middle outwards, the outermost ones cut to length; `earlier` yields the nearest one first."""
    head: list[Sequence[int]] = []
    tail: list[Sequence[int]] = []
    while sum(map(len, head)) < before:
        head.append(next(earlier))
    while sum(map(len, tail)) < after:
        tail.append(next(later))
    sentences = [*reversed(head), *tail]
    shift = sum(map(len, head)) - before
    starts = np.cumsum([0, *map(len, sentences)]) - shift
    tokens = np.concatenate([np.zeros(0, dtype=np.int64), *map(np.asarray, sentences)])[shift : shift + before + after]
    inside = starts[(starts >= 0) & (starts < before + after)]
    return Tape(tokens.astype(np.int64), np.unique([*inside, before, before + after]))


class NoiseHaystack(Haystack):
    """The same few sentences again and again, from a random one on."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._sentences = [tokenizer.tokenize_piece(text) for text in NOISE]

    def tape(self, rng: np.random.Generator, before: int, after: int) -> Tape:
        """See the base class."""
        count, first = len(self._sentences), int(rng.integers(len(self._sentences)))

        def walk(number: int, step: int) -> Iterator[Sequence[int]]:
            while True:
                yield self._sentences[number % count]
                number += step

        return _from_sentences(walk(first - 1, -1), walk(first, 1), before, after)


class NeedleHaystack(Haystack):
    """Needles with other keys and values than those that are asked for.

    Args:
        draw: the tokens of one more needle, with keys and values drawn from the generator.
    """

    def __init__(self, draw: Callable[[np.random.Generator], Sequence[int]]) -> None:
        self._draw = draw

    def tape(self, rng: np.random.Generator, before: int, after: int) -> Tape:
        """See the base class."""

        def needles() -> Iterator[Sequence[int]]:
            while True:
                yield self._draw(rng)

        return _from_sentences(needles(), needles(), before, after)


class TextHaystack(Haystack):
    """A random stretch of a real text, which is read as a circle.

    Args:
        tokens: ids of the text; ends of documents are left out.
        tokenizer: of these ids.
        where: the text's place, for messages.
    """

    def __init__(self, tokens: NDArray[Any] | Sequence[int], tokenizer: Tokenizer, where: str) -> None:
        text, self.where = np.asarray(tokens, dtype=np.int64), where
        with contextlib.suppress(DataError):  # a vocabulary without an end of document
            text = text[text != tokenizer.eod]
        if not len(text):
            raise DataError("the haystack is empty", where=where, hint="name another text with eval_text")
        ends = [i for i in np.unique(text).tolist() if tokenizer.detokenize([i]).rstrip(" ").endswith(_SENTENCE_ENDS)]
        self._tokens = text
        starts = (np.flatnonzero(np.isin(text, ends)) + 1) % len(text)
        self._starts = np.unique([0, *starts])

    @classmethod
    def of(cls, documents: Iterable[NDArray[Any]], where: str, tokenizer: Tokenizer) -> TextHaystack:
        """The haystack of documents, of which the first ones with `TEXT_TOKENS` tokens together are read."""
        chosen: list[NDArray[Any]] = []
        count = 0
        for document in documents:
            chosen.append(document)
            count += len(document)
            if count >= TEXT_TOKENS:
                break
        return cls(np.concatenate(chosen) if chosen else [], tokenizer, where)

    def tape(self, rng: np.random.Generator, before: int, after: int) -> Tape:
        """See the base class.

        Raises:
            DataError: the text has fewer tokens.
        """
        size, count = before + after, len(self._tokens)
        if size > count:
            raise DataError(
                "the text is too short for a haystack",
                where=self.where,
                why=f"it has {count:,} tokens, {size:,} are needed",
                hint="shorter lengths, or a longer text: --set eval_text=FILE",
            )
        first = int(self._starts[rng.integers(len(self._starts))]) - before
        starts = np.sort((self._starts - first) % count)
        inside = starts[starts < size]
        return Tape(self._tokens[(first + np.arange(size)) % count], np.unique([*inside, before, size]))
