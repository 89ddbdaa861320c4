"""Classification of the examples of a data set: byte sequences with a class each, read from a local source.

Unlike a drawn task, a stored one has an end. Every example belongs to one split: to that of its folder or file where the
source has splits of its own, else by the hash of its content, so that equal contents never stand in two splits and a further
file moves no other. The order within a split is that of the hashes, as good as random and the same on every machine. The last
byte is followed by a mark, at which the number of the class is asked for.
"""

from __future__ import annotations

import functools
import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from megatron.errors import DataError
from megatron.synthetics.task import Examples, Ids, Task, blank_labels


@dataclass(frozen=True)
class Records:
    """A data set.

    Attributes:
        contents: byte sequences.
        labels: name of the class of each.
        splits: train, valid or test of each; empty where the source does not say.
    """

    contents: Sequence[bytes]
    labels: Sequence[str]
    splits: Sequence[str]


@dataclass(frozen=True)
class Stored:
    """The examples of one split.

    Attributes:
        contents: byte sequences, in the order of their hashes.
        labels: i64 [n], numbers of their classes.
        classes: names, by number.
    """

    contents: Sequence[bytes]
    labels: Ids
    classes: tuple[str, ...]


@dataclass(frozen=True)
class StoredTask(Task):
    """The parameters of a data set.

    Attributes:
        source: the word of a built-in data set, or a path.
        labels: names of the classes with commas between, which get the numbers 0, 1, ...; others are left out. Empty: all
            classes, sorted by name.
        valid_share: of the examples without a split; where the source has train and test alone, of train.
        test_share: of the examples without a split.
        split: `train`, `valid` or `test`.
    """

    stored: ClassVar[bool] = True
    source: str = ""
    labels: str = ""
    valid_share: float = 0.1
    test_share: float = 0.1
    split: str = field(default="train", repr=False)

    @property
    @abstractmethod
    def mark(self) -> int:
        """Id after the last byte, at which the class is asked for; the largest id."""

    @abstractmethod
    def read(self) -> Records:
        """Read the source.

        Raises:
            DataError: it is missing or damaged, or holds something else.
        """

    @property
    def rows(self) -> int:
        """Ids of the content, and the mark."""
        return self.mark + 1

    def available(self, requested: int | None = None) -> int:
        """Number of examples: `requested`, None for all.

        Raises:
            DataError: the split has fewer, or none.
        """
        count = len(stored_split(self).labels)
        if count == 0 or (requested or 0) > count:
            raise DataError(
                f"the {self.split} split of {self.name} has {count} examples" + (f", not {requested}" if requested else ""),
                where=self.source,
                hint="change examples, or valid_share and test_share",
            )
        return requested or count

    def take(self, ids: Ids) -> Examples:
        """The examples of these numbers: [n, s] each."""
        data, mark = stored_split(self), self.mark
        inputs, labels = np.zeros((len(ids), self.seq_length), dtype=np.int64), blank_labels(len(ids), self.seq_length)
        for row, number in enumerate(ids.tolist()):
            content = np.frombuffer(data.contents[number], dtype=np.uint8)
            inputs[row, : len(content)], inputs[row, len(content)] = content, mark
            labels[row, len(content)] = data.labels[number]
        return Examples(inputs, labels)

    def draw(self, rng: np.random.Generator, count: int) -> Examples:
        """`count` examples of the split, with replacement."""
        return self.take(rng.integers(self.available(), size=count))

    def fingerprint(self) -> str:
        """Hexadecimal digest of the split's contents and classes."""
        data = stored_split(self)
        digest = hashlib.sha256(" ".join(data.classes).encode() + data.labels.tobytes())
        for content in data.contents:
            digest.update(hashlib.blake2b(content, digest_size=16).digest())
        return digest.hexdigest()


def content_digest(content: bytes) -> bytes:
    """The hash that orders examples and chooses their split."""
    return hashlib.blake2b(content, digest_size=8).digest()


@functools.lru_cache(maxsize=4)
def all_records(task: StoredTask) -> Records:
    """The records of a source; the task is that of the train split, whichever split is asked for."""
    return task.read()


@functools.lru_cache(maxsize=12)
def stored_split(task: StoredTask) -> Stored:
    """The examples of the task's split.

    Raises:
        DataError: as `read`, or a class of `labels` has no example, or there are fewer than two or too many classes.
    """
    records = all_records(replace(task, split="train"))
    present = sorted(set(records.labels))
    classes = [name.strip() for name in task.labels.split(",") if name.strip()] or present
    problem: dict[str, Any] = {"where": task.source}
    if missing := [name for name in classes if name not in present]:
        raise DataError(f"no example has the label '{missing[0]}'", hint=f"its labels: {', '.join(present[:20])}", **problem)
    if not 2 <= len(classes) <= task.mark:
        raise DataError(f"{task.name} has {len(classes)} classes", why=f"2 to {task.mark} are possible", **problem)
    number = {name: i for i, name in enumerate(classes)}
    chosen = []
    for content, label, split in zip(records.contents, records.labels, records.splits, strict=True):
        digest = content_digest(content)
        if label in number and (split or _split_of(digest, task.valid_share, task.test_share)) == task.split:
            chosen.append((digest, number[label], content))
    chosen.sort()
    labels = np.array([label for _, label, _ in chosen], dtype=np.int64)
    return Stored([content for *_, content in chosen], labels, tuple(classes))


def _split_of(digest: bytes, valid_share: float, test_share: float) -> str:
    """Split of a content without one, by its hash."""
    share = int.from_bytes(digest[:7], "big") / (1 << 56)
    return "test" if share < test_share else "valid" if share < test_share + valid_share else "train"


def share_train(records: Records, valid_share: float) -> Records:
    """Records with splits, of which part of train becomes valid where the source has no valid split."""
    if "valid" in records.splits:
        return records
    splits = [
        "valid" if split == "train" and _split_of(content_digest(content), valid_share, 0.0) == "valid" else split
        for content, split in zip(records.contents, records.splits, strict=True)
    ]
    return Records(records.contents, records.labels, splits)
