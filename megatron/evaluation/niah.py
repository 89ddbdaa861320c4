"""Needles in a haystack, RULER's eight kinds (arXiv 2404.06654): prompts of an exact number of tokens for any tokenizer.

A needle says which value (a number or a UUID) belongs to a key (two words or a UUID). Needles are hidden in a haystack at given
depths, and the values of one or several keys are asked for at the end. The kinds differ as in RULER's repository:

    niah_single_1     noise, words -> numbers        niah_multikey_1   text with 3 more needles
    niah_single_2     text, words -> numbers         niah_multikey_2   nothing but needles, words -> numbers
    niah_single_3     text, words -> UUIDs           niah_multikey_3   nothing but needles, UUIDs -> UUIDs
    niah_multivalue   text, 4 values of one key      niah_multiquery   text, the values of 4 keys

The wording, the words of the keys and the noise are ours, and the text is any (RULER: Paul Graham's essays): scores compare
models with each other, and with published scores only roughly.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron.data.tokenizer_base import Tokenizer
from megatron.errors import ConfigError, DataError
from megatron.evaluation.haystack import Haystack, NeedleHaystack, NoiseHaystack
from megatron.synthetics.task import Ids

_FIRST = (
    "amber ancient bitter blue brave brisk bronze calm clever copper crimson crooked curious damp dusty eager early faded "
    "fancy fierce foggy gentle gilded golden grand green hasty hidden hollow humble icy idle ivory jolly keen late lively "
    "lonely lucky mellow misty modest narrow noble olive pale patient plain proud purple quick quiet rapid rocky rosy "
    "rough rustic salty scarlet secret shady sharp silent silver simple sleepy slender smooth snowy solid steady stormy "
    "sturdy sunny swift tame tender thirsty tidy tiny vast velvet violet warm wild windy wise wooden young"
)
_SECOND = (
    "acorn anchor anvil apple arrow badger barrel basket beacon bell birch blanket boat bottle bridge broom bucket button "
    "cabin candle canyon castle cedar cellar chimney clock cloud coat compass cradle crane cricket curtain daisy desert "
    "donkey drum eagle engine falcon feather fence ferry fiddle finch fountain fox garden gate glacier goose hammer "
    "harbor harp hazel hedge heron hill horn island jacket kettle key kite ladder lake lantern lemon lighthouse lion "
    "maple meadow mill mirror mountain needle nest oak orchard otter owl paddle parrot pebble pepper piano pillow pine "
    "pocket pond quarry quilt rabbit raven river robin rope saddle sail salmon shore spoon sparrow stable station stone "
    "sword table teapot thimble thistle tower trumpet tulip tunnel turtle valley vase village wagon walnut walrus wheel "
    "whistle willow window wolf"
)
_MARGIN = 8  # tokens of an answer before its first value and between values, beside its bytes
CHOICES = 8  # values to choose from by likelihood, the right one included
NOUNS = {"numbers": "number", "uuids": "code"}


@dataclass(frozen=True)
class Kind:
    """What is hidden where, and what is asked for.

    Attributes:
        haystack: noise | text | needles.
        key: words | uuids.
        value: numbers | uuids.
        keys: needles with different keys, asked for or not.
        values: values of each key, each in its own needle.
        queries: keys that are asked for.
    """

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


KINDS: dict[str, Kind] = {
    "niah_single_1": Kind("noise"),
    "niah_single_2": Kind("text"),
    "niah_single_3": Kind("text", value="uuids"),
    "niah_multikey_1": Kind("text", keys=4),
    "niah_multikey_2": Kind("needles"),
    "niah_multikey_3": Kind("needles", key="uuids", value="uuids"),
    "niah_multivalue": Kind("text", values=4),
    "niah_multiquery": Kind("text", keys=4, queries=4),
}


@dataclass(frozen=True)
class Case:
    """A prompt and what has to follow it.

    Attributes:
        prompt: [p] ids.
        answer: ids that a perfect model says next, all values in order.
        values: texts that the generated text must contain; empty: `answer` itself must be generated.
        choices: answers for the first value alone, for a choice by likelihood; the right one comes first.
        depths: where the needle of each value was put, as a share of the haystack.
        places: first token of the needle of each value in the prompt.
        room: tokens to generate at most.
    """

    prompt: Ids
    answer: tuple[int, ...]
    values: tuple[str, ...]
    choices: tuple[tuple[int, ...], ...]
    depths: tuple[float, ...]
    places: tuple[int, ...]
    room: int


class CaseSource(ABC):
    """A family of needle prompts, by length and depth."""

    name: str

    @abstractmethod
    def case(self, rng: np.random.Generator, length: int, depth: float) -> Case:
        """One prompt which, with its answer, fits into `length` tokens; its first needle is at `depth`, from 0 to 1."""


def draw_key(rng: np.random.Generator, kind: str) -> str:
    """A key: `numbers` of seven digits, `uuids` of version 4, or two `words`."""
    if kind == "numbers":
        return str(int(rng.integers(10**6, 10**7)))
    if kind == "uuids":
        return str(uuid.UUID(bytes=rng.bytes(16), version=4))
    return "-".join(words[int(rng.integers(len(words)))] for words in (_FIRST.split(), _SECOND.split()))


def draw_distinct(rng: np.random.Generator, kind: str, count: int, without: Callable[[str], bool]) -> list[str]:
    """`count` different keys or values of which none fulfils `without`."""
    drawn: list[str] = []
    while len(drawn) < count:
        text = draw_key(rng, kind)
        if text not in drawn and not without(text):
            drawn.append(text)
    return drawn


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


class NiahSource(CaseSource):
    """Prompts of one of RULER's kinds.

    Args:
        name: one of `KINDS`.
        tokenizer: of the model.
        text: haystack of real text, which five kinds need.

    Raises:
        ConfigError: the kind needs a text.
        DataError: the tokenizer cannot encode needles.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, text: Haystack | None = None) -> None:
        self.name, self.kind, self.tokenizer = name, KINDS[name], tokenizer
        self._noun = NOUNS[self.kind.value]
        if self.kind.haystack == "text" and text is None:
            raise ConfigError(f"{name} hides its needles in a text", hint="set data_path, or --set eval_text=FILE")
        self._check_tokenizer()
        self._text = text if self.kind.haystack == "text" else NoiseHaystack(tokenizer)
        size = {"numbers": 7, "uuids": 36}[self.kind.value] + len(" and ")
        self.room = size * self.kind.values * self.kind.queries + _MARGIN

    def _check_tokenizer(self) -> None:
        sentence = self._needle("amber-acorn", "1029384756-abcdef")
        again = self.tokenizer.detokenize(self.tokenizer.tokenize_piece(sentence))
        if again.strip() != sentence.strip():
            raise DataError(
                "the tokenizer cannot encode needles",
                where=self.tokenizer.name,
                why=f"{sentence.strip()!r} becomes {again.strip()!r}",
                hint="needles need English words, digits and hyphens in the vocabulary",
            )

    def _needle(self, key: str, value: str) -> str:
        return f" The secret {self._noun} of {key} is {value}."

    def _frame(self, keys: Sequence[str]) -> tuple[str, str]:
        """(text before the haystack, question after it)."""
        noun, several = self._noun, self.kind.values * self.kind.queries > 1
        plural = f"{noun}s" if several or self.kind.haystack == "needles" or self.kind.keys > 1 else noun
        intro = f"Somewhere in this text stands a secret {plural}. It is asked for at the end.\n"
        if plural != noun:
            intro = f"Somewhere in this text stand secret {plural}. They are asked for at the end.\n"
        subject = f"{noun}s of {_listed(keys)} are" if several else f"{noun} of {_listed(keys)} is"
        return intro, f"\nQuestion: the text above contains the answer. The secret {subject}"

    def case(self, rng: np.random.Generator, length: int, depth: float) -> Case:
        """See the base class; further needles are at random depths, at the nearest beginning of a sentence.

        Raises:
            DataError: the length leaves no room for a haystack, or the text is too short.
        """
        kind, piece = self.kind, self.tokenizer.tokenize_piece
        keys = draw_distinct(rng, kind.key, kind.keys, lambda _: False)
        queries = keys[: kind.queries]
        intro, question = self._frame(queries)
        head, end = [*self.tokenizer.template.before, *piece(intro)], piece(question)
        # places depend on the needles' sizes, and values must not stand in the haystack: values come after a first haystack
        for _ in range(100):
            values = draw_distinct(rng, kind.value, kind.keys * kind.values, lambda _: False)
            needles = [piece(self._needle(keys[i // kind.values], value)) for i, value in enumerate(values)]
            size = length - self.room - len(head) - len(end) - sum(map(len, needles))
            if size < 0:
                raise DataError(
                    f"{self.name} does not fit into {length} tokens",
                    why=f"needles, question and answer alone are {length - size}",
                    hint="longer lengths",
                )
            depths = [depth, *(float(d) for d in rng.random(len(needles) - 1))]
            before = round(depth * size)
            tape = self._haystack(keys).tape(rng, before, size - before)
            text = self.tokenizer.detokenize(tape.tokens.tolist()).lower()
            if not any(word.lower() in text for word in [*values, *queries]):
                break
        else:
            raise DataError("no haystack without the answer", where=self.name, hint="another text: --set eval_text=FILE")
        starts = [before, *(int(tape.starts[np.argmin(np.abs(tape.starts - d * size))]) for d in depths[1:])]
        body, places = _inserted(tape.tokens, needles, starts)
        count = kind.queries * kind.values
        wrong = draw_distinct(rng, kind.value, CHOICES - 1, lambda text: text in values)
        return Case(
            prompt=np.concatenate([head, body, end]).astype(np.int64),
            answer=tuple(piece(f" {_listed(values[:count])}.")),
            values=tuple(values[:count]),
            choices=tuple(tuple(piece(f" {value}")) for value in [values[0], *wrong]),
            depths=(depth, *(start / max(1, size) for start in starts[1:count])),
            places=tuple(len(head) + place for place in places[:count]),
            room=self.room,
        )

    def _haystack(self, keys: Sequence[str]) -> Haystack:
        if self.kind.haystack != "needles":
            assert self._text is not None
            return self._text

        def distractor(rng: np.random.Generator) -> list[int]:
            key = draw_distinct(rng, self.kind.key, 1, lambda text: text in keys)[0]
            return self.tokenizer.tokenize_piece(self._needle(key, draw_key(rng, self.kind.value)))

        return NeedleHaystack(distractor)


def _inserted(tape: Ids, needles: Sequence[Sequence[int]], starts: Sequence[int]) -> tuple[Ids, list[int]]:
    """The haystack with its needles, and where each needle begins; at equal places the first needle comes first."""
    parts: list[Sequence[int] | Ids] = []
    places, last, added = [0] * len(needles), 0, 0
    for i in sorted(range(len(needles)), key=lambda i: starts[i]):
        parts += [tape[last : starts[i]], needles[i]]
        places[i], last, added = starts[i] + added, starts[i], added + len(needles[i])
    return np.concatenate([*map(np.asarray, parts), tape[last:]]).astype(np.int64), places
