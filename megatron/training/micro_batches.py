"""Micro batches on their way into a step: taken from the loader, timed, with their sample ids."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice

from megatron.data.micro_batch import MicroBatch
from megatron.errors import DataError


def take_micro_batches(loader: Iterator[MicroBatch], count: int) -> list[MicroBatch]:
    """The next `count` micro batches.

    Every rank takes them, also a middle pipeline stage that reads none: the data cursor is then the same everywhere.

    Raises:
        DataError: fewer are left.
    """
    micro_batches = list(islice(loader, count))
    if len(micro_batches) < count:
        raise DataError(f"the data ended: {len(micro_batches)} of {count} micro batches were left")
    return micro_batches


class TimedLoader:
    """An iterator over `batches` that sums the waiting time and collects the sample ids since the last `begin_step`."""

    def __init__(self, batches: Iterator[MicroBatch], clock: Callable[[], float] = time.perf_counter) -> None:
        self._batches, self._clock = batches, clock
        self.wait_s = 0.0
        self.sample_ids: list[int] = []

    def __iter__(self) -> TimedLoader:
        return self

    def __next__(self) -> MicroBatch:
        begin = self._clock()
        try:
            batch = next(self._batches)
        finally:
            self.wait_s += self._clock() - begin
        self.sample_ids += batch.sample_ids
        return batch

    def begin_step(self) -> None:
        """Reset samples and waiting time."""
        self.wait_s, self.sample_ids = 0.0, []
