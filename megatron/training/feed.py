"""The batches on their way into a step: how long the step waited for them, and which samples they were."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Protocol

from torch import Tensor


class Batch(Protocol):
    """What a step is fed with (`megatron.data.batches.Batch`): an engine's micro batch that knows its samples."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    segment_ids: Tensor | None
    sample_ids: list[int]


class Feed:
    """An iterator over `batches` that adds up the waiting and keeps the sample ids since the last `begin_step`."""

    def __init__(self, batches: Iterator[Batch], clock: Callable[[], float] = time.perf_counter) -> None:
        self._batches, self._clock = batches, clock
        self.wait_s = 0.0
        self.sample_ids: list[int] = []

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> Batch:
        begin = self._clock()
        try:
            batch = next(self._batches)
        finally:
            self.wait_s += self._clock() - begin
        self.sample_ids += batch.sample_ids
        return batch

    def begin_step(self) -> None:
        """Forget the last step's samples and waiting."""
        self.wait_s, self.sample_ids = 0.0, []
