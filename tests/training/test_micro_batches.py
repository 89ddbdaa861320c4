"""Micro batches on their way into a step: a step's worth at a time, timed, with their sample ids."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron.errors import DataError
from megatron.training.micro_batches import TimedLoader, take_micro_batches


def test_the_next_ones_are_taken_and_no_more() -> None:
    loader = iter(range(5))
    assert take_micro_batches(loader, 2) == [0, 1] and next(loader) == 2
    with pytest.raises(DataError, match="2 of 3 micro batches were left"):
        take_micro_batches(loader, 3)


def test_waiting_and_samples_are_those_of_one_step() -> None:
    batches = iter([SimpleNamespace(sample_ids=[n, n + 1]) for n in (0, 2, 4)])
    ticks = iter([0.0, 1.0, 5.0, 7.0, 10.0, 10.5])
    loader = TimedLoader(batches, lambda: next(ticks))  # type: ignore[arg-type]
    take_micro_batches(loader, 2)
    assert (loader.wait_s, loader.sample_ids) == (3.0, [0, 1, 2, 3])
    loader.begin_step()
    take_micro_batches(loader, 1)
    assert (loader.wait_s, loader.sample_ids) == (0.5, [4, 5])
