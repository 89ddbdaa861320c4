"""The tasks of MAD (arXiv 2403.17844): in-context recall, plain, noisy and fuzzy; memorization; selective copy; compression.

As there, the vocabulary is small and keys come again and again. Two things differ. Training and test ask the same positions
(MAD trains on every next token and tests on the answers): a slice of either kind is made by one function. And `compression`
asks for the sequence behind its end mark, since a causal language model has no decoder that unfolds one hidden state as MAD's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from megatron.data.labels import IGNORED
from megatron.synthetics.task import Examples, Ids, Mask, Task, blank_labels, distinct, first_places, need


@dataclass(frozen=True)
class _Sized(Task):
    """A task over `vocab_size` ids."""

    length: int
    vocab_size: int = 16

    @property
    def rows(self) -> int:
        """V."""
        return self.vocab_size

    @property
    def seq_length(self) -> int:
        """As asked for."""
        return self.length


@dataclass(frozen=True)
class InContextRecall(_Sized):
    """Key-value pairs with a fresh map per example; a key that comes again asks for its value, and the last one always does.

    Keys are the first half of the ids, values the second.
    """

    name: ClassVar[str] = "in_context_recall"

    def __post_init__(self) -> None:
        need(self.length % 2 == 0 and self.length >= 4, self, "length must be even and at least 4")
        need(self.vocab_size >= 4, self, "two keys and two values are needed")

    def draw(self, rng: np.random.Generator, count: int) -> Examples:
        """See the class."""
        pairs, half = self.length // 2, self.vocab_size // 2
        keys, values = rng.integers(half, size=(count, pairs)), rng.integers(half, self.vocab_size, size=(count, pairs))
        keys[:, -1] = keys[np.arange(count), rng.integers(pairs - 1, size=count)]
        return compose_recall(keys, values, None)


def compose_recall(keys: Ids, values: Ids, noise: Ids | None) -> Examples:
    """Pairs `k1 v1 k2 v2 ...`.

    Args:
        keys: [n, p]. values: [n, p]; where a key was seen before, the value it had first is used.
        noise: [n, p, 2] pairs of noise ids, negative where the pair is a key with its value; a noise pair asks nothing.

    Returns:
        n examples of 2 p tokens; the label at a repeated key is its value.
    """
    rows, pairs = keys.shape
    silent = np.zeros(keys.shape, dtype=bool) if noise is None else noise[..., 0] >= 0
    # A key under noise was not shown: it gets an id of its own, so that it neither repeats nor is repeated.
    first = first_places(np.where(silent, -1 - np.arange(pairs), keys))
    values = np.take_along_axis(values, first, 1)
    text = np.stack([keys, values], axis=-1)
    if noise is not None:
        text = np.where(silent[..., None], noise, text)
    labels = blank_labels(rows, 2 * pairs)
    labels[:, 0::2] = np.where(first < np.arange(pairs), values, labels[:, 0::2])
    return Examples(text.reshape(rows, 2 * pairs), labels)


@dataclass(frozen=True)
class NoisyRecall(_Sized):
    """In-context recall in which a pair is two noise ids with probability `noise`; noise ids are the last `noise_ids`."""

    name: ClassVar[str] = "noisy_recall"
    vocab_size: int = 32
    noise_ids: int = 16
    noise: float = 0.2

    def __post_init__(self) -> None:
        need(self.length % 2 == 0 and self.length >= 4, self, "length must be even and at least 4")
        need(0 <= self.noise < 1 and self.noise_ids >= 1, self, "noise must be in [0, 1) and have ids")
        need(self.vocab_size - self.noise_ids >= 4, self, "two keys and two values are needed beside the noise")

    def draw(self, rng: np.random.Generator, count: int) -> Examples:
        """See the class. One pair before the last is never noise, and the last asks for a key that was shown."""
        pairs, kept = self.length // 2, self.vocab_size - self.noise_ids
        keys, values = rng.integers(kept // 2, size=(count, pairs)), rng.integers(kept // 2, kept, size=(count, pairs))
        noise = rng.integers(kept, self.vocab_size, size=(count, pairs, 2))
        loud, at = rng.random((count, pairs)) < self.noise, np.arange(count)
        loud[at, rng.integers(pairs - 1, size=count)] = False
        loud[:, -1] = False
        shown = np.argmax(np.where(loud[:, :-1], -1.0, rng.random((count, pairs - 1))), axis=1)
        keys[:, -1] = keys[at, shown]
        return compose_recall(keys, values, np.where(loud[..., None], noise, -1))


@dataclass(frozen=True)
class FuzzyRecall(_Sized):
    """In-context recall whose keys and values are motifs of 1 to `key_length` and 1 to `value_length` different tokens.

    `full_keys` makes all keys of the full length, as MAD does in its test. Motifs leave the last two ids alone; the very last
    fills the example on the left. The last motif repeats a key that was shown.
    """

    name: ClassVar[str] = "fuzzy_recall"
    key_length: int = 3
    value_length: int = 3
    full_keys: bool = False

    def __post_init__(self) -> None:
        half = (self.vocab_size - 2) // 2
        need(1 <= self.key_length <= half and 1 <= self.value_length <= half, self, "motifs must fit into half of the ids")
        need(self.length >= 2 * (self.key_length + self.value_length), self, "two pairs must fit into length")

    def draw(self, rng: np.random.Generator, count: int) -> Examples:
        """See the class."""
        k, v, half = self.key_length, self.value_length, (self.vocab_size - 2) // 2
        slots = self.length // 2 + 1
        shape = (count, slots)
        keys = distinct(rng, count * slots, k, 0, half).reshape(*shape, k)
        values = distinct(rng, count * slots, v, half, 2 * half).reshape(*shape, v)
        key_sizes = np.full(shape, k) if self.full_keys else rng.integers(1, k + 1, size=shape)
        value_sizes = rng.integers(1, v + 1, size=shape)
        keys = np.where(np.arange(k) < key_sizes[..., None], keys, -1)
        # The same key has the same value: the one of its first slot.
        first = first_places(((keys + 1) * (half + 1) ** np.arange(k)).sum(-1))
        values = np.where(np.arange(v) < value_sizes[..., None], values, -1)
        values = np.take_along_axis(values, first[..., None], 1)
        used = np.cumsum((keys >= 0).sum(-1) + (values >= 0).sum(-1), axis=1) <= self.length + 1 - (k + v)
        last = used.sum(1)  # the slot of the final question
        asked = rng.integers(last)
        at = np.arange(count)
        keys[at, last], values[at, last] = keys[at, asked], values[at, asked]
        known = first < np.arange(slots)
        known[at, last] = True
        used[at, last] = True
        return _packed(keys, values, used, known, self.length, self.vocab_size - 1)


def _packed(keys: Ids, values: Ids, used: Mask, known: Mask, length: int, pad: int) -> Examples:
    """Motifs [n, p, k] and [n, p, v] (negative: no token) of the used slots in a row, filled with `pad` on the left.

    Values of `known` slots are asked for, each of their tokens at the token before it.
    """
    rows, k = keys.shape[0], keys.shape[2]
    text = np.where(used[..., None], np.concatenate([keys, values], axis=-1), -1)
    ask = (text >= 0) & known[..., None] & (np.arange(text.shape[-1]) >= k)
    text, ask = text.reshape(rows, -1), ask.reshape(rows, -1)
    there = text >= 0
    place = np.cumsum(there, axis=1) - 1 + (length + 1 - there.sum(1, keepdims=True))
    row, column = np.nonzero(there)
    tokens, targets = np.full((rows, length + 1), pad, dtype=np.int64), blank_labels(rows, length + 1)
    tokens[row, place[row, column]] = text[row, column]
    targets[row, place[row, column]] = np.where(ask, text, IGNORED)[row, column]
    return Examples(tokens[:, :-1], targets[:, 1:])


@dataclass(frozen=True)
class Memorization(_Sized):
    """Keys and an insert mark behind each; at the mark the key's value in a map that is the same in all examples is asked.

    The map is drawn by `map_seed`: it has to be learnt by heart and stands in no example. The mark is the last id.
    """

    name: ClassVar[str] = "memorization"
    vocab_size: int = 256
    map_seed: int = 12345

    def __post_init__(self) -> None:
        need(self.length % 2 == 0 and self.length >= 2, self, "length must be even")
        need(self.vocab_size >= 5, self, "two keys, two values and a mark are needed")

    def draw(self, rng: np.random.Generator, count: int) -> Examples:
        """See the class."""
        half = (self.vocab_size - 1) // 2
        of = np.random.Generator(np.random.Philox(key=self.map_seed)).permutation(half) + half
        keys = rng.integers(half, size=(count, self.length // 2))
        inputs = np.full((count, self.length), self.vocab_size - 1, dtype=np.int64)
        labels = blank_labels(count, self.length)
        inputs[:, 0::2], labels[:, 1::2] = keys, of[keys]
        return Examples(inputs, labels)


@dataclass(frozen=True)
class SelectiveCopy(_Sized):
    """`tokens` ids at random places among blanks, a copy mark, and as many blanks, at which they are asked for in order.

    The last two ids are the blank and the mark.
    """

    name: ClassVar[str] = "selective_copy"
    tokens: int = 16

    def __post_init__(self) -> None:
        need(self.tokens >= 1 and self.length >= 2 * self.tokens + 1, self, "2 x tokens + 1 must fit into length")
        need(self.vocab_size >= 4, self, "two ids, a blank and a mark are needed")

    def draw(self, rng: np.random.Generator, count: int) -> Examples:
        """See the class."""
        body = self.length - self.tokens - 1
        text = rng.integers(self.vocab_size - 2, size=(count, self.tokens))
        places = np.sort(distinct(rng, count, self.tokens, 0, body), axis=1)
        inputs = np.full((count, self.length), self.vocab_size - 2, dtype=np.int64)
        np.put_along_axis(inputs, places, text, 1)
        inputs[:, body] = self.vocab_size - 1
        labels = blank_labels(count, self.length)
        labels[:, body + 1 :] = text
        return Examples(inputs, labels)


@dataclass(frozen=True)
class Compression(_Sized):
    """A random sequence, a mark, and as many blanks, at which the sequence is asked for: the state must hold all of it.

    `length` is odd: 2 tokens per place and the mark. The last two ids are the blank and the mark.
    """

    name: ClassVar[str] = "compression"

    def __post_init__(self) -> None:
        need(self.length % 2 == 1 and self.length >= 3, self, "length must be odd: the sequence, a mark, the sequence again")
        need(self.vocab_size >= 4, self, "two ids, a blank and a mark are needed")

    def draw(self, rng: np.random.Generator, count: int) -> Examples:
        """See the class."""
        return SelectiveCopy(self.length, self.vocab_size, self.length // 2).draw(rng, count)
