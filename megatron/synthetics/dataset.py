"""Slices of synthetic examples behind the face of all datasets: example i of a slice is a function of (seed, slice, i) alone.

A slice is a task with its parameters and a number of examples; a split (train, valid, test) is a list of slices. Nothing is
stored: examples are drawn in blocks when they are first asked for, and the last blocks are kept. (A stored task reads a data
set instead, whose splits share no example, `stored.py`.) A batch never mixes slices, as in Zoology, so that lengths may differ
between slices. In training the order is drawn again for every epoch: the blocks of a slice and the examples inside a block are
shuffled, and slices take turns at random by their number of batches.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.datasets import Sample, TokenDataset
from megatron.data.labels import IGNORED
from megatron.data.tokenizer_base import Tokenizer
from megatron.errors import ConfigError, DataError
from megatron.synthetics.listops import ListOps
from megatron.synthetics.mad import (
    Compression,
    FuzzyRecall,
    InContextRecall,
    Memorization,
    NoisyRecall,
    SelectiveCopy,
)
from megatron.synthetics.needle import NeedleNumbers, NeedleText
from megatron.synthetics.pixels import Pixels
from megatron.synthetics.recall import MultiQueryRecall, SetDisjointness
from megatron.synthetics.state_tracking import ModularArithmetic, StateTracking
from megatron.synthetics.stored import StoredTask
from megatron.synthetics.task import Examples, Ids, Task, checked
from megatron.synthetics.text_bytes import TextBytes

BLOCK = 1024
CACHE_BYTES = 1 << 28
SPLITS = ("train", "valid", "test")
TASKS: dict[str, type[Task]] = {
    kind.name: kind
    for kind in (
        MultiQueryRecall,
        SetDisjointness,
        NeedleNumbers,
        NeedleText,
        InContextRecall,
        NoisyRecall,
        FuzzyRecall,
        Memorization,
        SelectiveCopy,
        Compression,
        ListOps,
        TextBytes,
        Pixels,
        StateTracking,
        ModularArithmetic,
    )
}


@dataclass(frozen=True)
class Slice:
    """A task with its parameters, and how many examples of it there are.

    Attributes:
        requested: number of examples; None: all that a stored task has.
    """

    task: Task
    requested: int | None

    @property
    def examples(self) -> int:
        """Number of examples; a stored task reads its data set, a DataError says if it cannot or has fewer than requested."""
        if isinstance(self.task, StoredTask):
            return self.task.available(self.requested)
        assert self.requested is not None  # `read_slices`
        return self.requested


def task_kind(name: Any) -> type[Task]:
    """The task of this name; a ConfigError names all."""
    if name not in TASKS:
        raise ConfigError(f"there is no synthetic task '{name}'", hint="one of " + ", ".join(TASKS))
    return TASKS[name]


def read_slices(spec: Mapping[str, Any], split: str, tokenizer: Tokenizer | None = None) -> list[Slice]:
    """The slices of one split.

    Args:
        spec: `task`, parameters that all slices share, and per split a list of mappings with `examples` and more parameters.
            `valid` is `test` where it is not given, and the other way round. A stored task has all examples of the split
            unless `examples` says fewer; its data set is not read here.

    Raises:
        ConfigError: something is unknown, missing, or of the wrong kind.
    """
    kind = task_kind(spec.get("task"))
    shared = {name: value for name, value in spec.items() if name not in ("task", *SPLITS)}
    given = spec.get(split) or (spec.get({"valid": "test", "test": "valid"}.get(split, "")) or ())
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ConfigError(f"{kind.name}: no slices for '{split}'", hint=f"{split}: [{{examples: 1000, ...}}]")
    slices = []
    for entry in given:
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{kind.name}: a slice of '{split}' is {entry!r}", why="a mapping of parameters is expected")
        values = {**shared, **entry}
        examples = values.pop("examples", None)
        if not (kind.stored and examples is None) and (type(examples) is not int or examples < 1):
            raise ConfigError(f"{kind.name}: a slice of '{split}' has examples {examples!r}", why="a positive number is needed")
        bound: dict[str, Any] = {"tokenizer": tokenizer} if kind.reads_text else {}
        if kind.stored:
            bound["split"] = split
        slices.append(Slice(checked(kind, values, **bound), examples))
    return slices


class ExampleStore:
    """The examples of one slice.

    Args:
        seed, stream: what its random numbers depend on besides the block; different streams never share any.
    """

    def __init__(self, part: Slice, seed: int, stream: int) -> None:
        self.task, self.examples = part.task, part.examples
        self._seed, self._stream = seed, stream
        self._blocks: OrderedDict[int, Examples] = OrderedDict()
        self._max_blocks = max(2, CACHE_BYTES // (BLOCK * 16 * part.task.seq_length))

    def __len__(self) -> int:
        return self.examples

    def _block(self, number: int) -> Examples:
        block = self._blocks.get(number)
        if block is None:
            key = np.array([self._seed, (self._stream << 40) + number], dtype=np.uint64)
            rng = np.random.Generator(np.random.Philox(key=key))
            block = self.task.draw(rng, BLOCK)  # a complete block, so that more examples do not change the first ones
            self._blocks[number] = block
            if len(self._blocks) > self._max_blocks:
                self._blocks.popitem(last=False)
        else:
            self._blocks.move_to_end(number)
        return block

    def rows(self, ids: Ids) -> Examples:
        """The examples of these numbers, in this order: [n, s] each."""
        if isinstance(self.task, StoredTask):
            return self.task.take(ids)
        shape = (len(ids), self.task.seq_length)
        inputs, labels = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
        of = ids // BLOCK
        for number in np.unique(of):
            here, block = of == number, self._block(int(number))
            inputs[here], labels[here] = block.inputs[ids[here] % BLOCK], block.labels[ids[here] % BLOCK]
        return Examples(inputs, labels)


class SyntheticDataset(TokenDataset):
    """A split as numbered samples; sample i belongs to batch i // batch_size, and a batch to one slice.

    Args:
        slices: of the split.
        seed: of the run.
        split: `train`, `valid` or `test`, which share no example.
        batch_size: samples of a global batch.
        length: samples are padded to this many tokens with id 0 and ignored labels, after the example, where a causal
            model's answers do not see it; None: the longest slice.
        count: number of samples; training repeats the slices, in another order each time. None: one epoch.

    Attributes:
        stores: the slices' examples.
        batches_per_epoch: complete batches of all slices; the rest of a slice is dropped.

    Raises:
        DataError: a slice is smaller than a batch or longer than `length`, or there are not `count` samples.
    """

    def __init__(
        self,
        slices: Sequence[Slice],
        seed: int,
        split: str = "train",
        batch_size: int = 1,
        length: int | None = None,
        count: int | None = None,
    ) -> None:
        number = SPLITS.index(split)
        self.stores = [ExampleStore(part, seed, (number << 16) + i) for i, part in enumerate(slices)]
        longest = max(part.task.seq_length for part in slices)
        self.seq_length = longest if length is None else length
        self.split, self.batch_size, self._seed = split, batch_size, seed
        if longest > self.seq_length:
            raise DataError(f"{split} examples of {longest} tokens do not fit", why=f"seq_length is {self.seq_length}")
        for part in slices:
            if part.examples < batch_size:
                raise DataError(
                    f"a {split} slice of {part.examples} examples does not fill a batch of {batch_size}",
                    where=str(part.task.parameters()),
                    hint="raise its examples or lower the batch size",
                )
        self._turns = np.repeat(np.arange(len(slices)), [part.examples // batch_size for part in slices])
        self.batches_per_epoch = len(self._turns)
        self._count = self.batches_per_epoch * batch_size if count is None else count
        if split != "train" and self._count > self.batches_per_epoch * batch_size:
            raise DataError(
                f"{self._count} samples of the {split} slices are asked for, they have {self.batches_per_epoch * batch_size}",
                hint="lower eval_iters or raise the slices' examples",
            )
        self._epoch: tuple[int, list[tuple[int, int]]] = (-1, [])

    def __len__(self) -> int:
        return self._count

    def _rng(self, *place: int) -> np.random.Generator:
        """Order of an epoch: apart from all examples by its high bits."""
        words = (1 << 63) + sum(value << shift for value, shift in zip(place, (40, 24, 0), strict=False))
        return np.random.Generator(np.random.Philox(key=np.array([self._seed, words], dtype=np.uint64)))

    def epoch(self, number: int) -> list[tuple[int, int]]:
        """(slice, how manieth batch of it in this epoch) of every batch; evaluation splits take turns in their given order."""
        if self._epoch[0] != number:
            seen = np.zeros(len(self.stores), dtype=np.int64)
            turns = self._turns
            if self.split == "train":
                turns = self._rng(number).permutation(turns)
            else:  # first batches of all slices, then second ones
                places = np.concatenate([np.arange(np.sum(turns == i)) for i in range(len(self.stores))])
                turns = turns[np.argsort(places, kind="stable")]
            plan = []
            for turn in turns.tolist():
                plan.append((turn, int(seen[turn])))
                seen[turn] += 1
            self._epoch = (number, plan)
        return self._epoch[1]

    def ids(self, epoch: int, turn: int, batch: int) -> Ids:
        """[batch_size] numbers of the examples of a slice's `batch` in `epoch`."""
        places = np.arange(batch * self.batch_size, (batch + 1) * self.batch_size)
        if self.split != "train":
            return places
        whole = len(self.stores[turn]) // BLOCK  # a last part of a block stays last
        blocks = self._rng(epoch, turn + 1).permutation(whole)
        ids = np.empty_like(places)
        for at in np.unique(places // BLOCK):
            block = int(blocks[at]) if at < whole else int(at)
            size = min(BLOCK, len(self.stores[turn]) - block * BLOCK)
            order: NDArray[np.int64] = self._rng(epoch, turn + 1, block + 1).permutation(size)
            here = places // BLOCK == at
            ids[here] = block * BLOCK + order[places[here] % BLOCK]
        return ids

    def batch(self, number: int) -> tuple[int, Examples]:
        """Batch `number` of the whole run: its slice, and its examples at their own length."""
        epoch, place = divmod(number, self.batches_per_epoch)
        turn, batch = self.epoch(epoch)[place]
        return turn, self.stores[turn].rows(self.ids(epoch, turn, batch))

    def sample(self, index: int) -> Sample:
        """Sample `index`: tokens [seq_length + 1] of which the last is never read, targets shifted to stand one further."""
        if not 0 <= index < self._count:
            raise DataError(f"sample {index} does not exist", why=f"{self._count} were asked for")
        number, row = divmod(index, self.batch_size)
        epoch, place = divmod(number, self.batches_per_epoch)
        turn, batch = self.epoch(epoch)[place]
        example = self.stores[turn].rows(self.ids(epoch, turn, batch)[row : row + 1])
        tokens = np.zeros(self.seq_length + 1, dtype=np.int64)
        targets = np.full(self.seq_length + 1, IGNORED, dtype=np.int64)
        size = example.inputs.shape[1]
        tokens[:size], targets[1 : size + 1] = example.inputs[0], example.labels[0]
        return Sample(tokens, targets)
