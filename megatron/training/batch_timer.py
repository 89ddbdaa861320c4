"""The batches on their way into a step: how long the step waited for them, and which samples they were."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor


class Batch(Protocol):
    """What a step is fed with (`megatron.data.batches.Batch`): an engine's micro batch that knows its samples."""

    @property
    def tokens(self) -> Tensor:
        """[b, s]."""

    @property
    def labels(self) -> Tensor:
        """[b, s]."""

    @property
    def loss_mask(self) -> Tensor:
        """[b, s]."""

    @property
    def segment_ids(self) -> Tensor | None:
        """[b, s], or None where documents are not told apart."""

    @property
    def sample_ids(self) -> list[int]:
        """Global numbers of the b samples."""


class TimedBatches:
    """An iterator over `batches` that adds up the waiting and keeps the sample ids since the last `begin_step`."""

    def __init__(self, batches: Iterator[Batch], clock: Callable[[], float] = time.perf_counter) -> None:
        self._batches, self._clock = batches, clock
        self.wait_s = 0.0
        self.sample_ids: list[int] = []

    def __iter__(self) -> TimedBatches:
        return self

    def __next__(self) -> Any:  # a Batch, in whatever form the engine wants to read it
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
