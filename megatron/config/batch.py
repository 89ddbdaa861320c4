"""Solves global batch = micro batch x accumulation steps x data-parallel size for the sizes that are not given.

NeoX's six cases, and one more: `gradient_accumulation_steps` counts as unset by default (NeoX's default is 1), so the
pair train_batch_size + train_micro_batch_size_per_gpu is enough.
"""

from __future__ import annotations

from dataclasses import dataclass


class BatchError(ValueError):
    """Batch sizes that contradict each other; the message names the equation that fails."""


@dataclass(frozen=True)
class BatchSizes:
    """Global batch, micro batch and accumulation steps, in sequences."""

    train: int
    micro: int
    accumulation: int


def solve_batch(data_parallel: int, train: int = 0, micro: int = 0, accumulation: int = 0) -> BatchSizes:
    """Compute the sizes that are 0 (not given) and check the others.

    Args:
        data_parallel: number of data-parallel ranks.
        train: global batch in sequences.
        micro: micro batch in sequences.
        accumulation: micro batches per step.

    Raises:
        BatchError: the sizes contradict each other, or too few are given.
    """
    given = {
        "train_batch_size": train,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
    }
    for key, value in given.items():
        if value < 0:
            raise BatchError(f"{key} must be greater than 0, got {value}")
    if not train and not micro:
        raise BatchError("either train_batch_size or train_micro_batch_size_per_gpu is needed")
    if train and micro and not accumulation:
        accumulation = _divide(train, micro * data_parallel, f"{micro} per device x {data_parallel} data-parallel ranks")
    elif train and not micro:
        accumulation = accumulation or 1
        micro = _divide(
            train,
            accumulation * data_parallel,
            f"{accumulation} accumulation steps x {data_parallel} data-parallel ranks",
        )
    accumulation = accumulation or 1
    train = train or micro * accumulation * data_parallel
    if train != micro * accumulation * data_parallel:
        raise BatchError(
            f"train_batch_size {train} is not train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps"
            f" {accumulation} x data-parallel size {data_parallel} = {micro * accumulation * data_parallel}"
        )
    return BatchSizes(train, micro, accumulation)


def _divide(train: int, divisor: int, words: str) -> int:
    if train % divisor:
        raise BatchError(f"train_batch_size {train} is not a multiple of {divisor} ({words})")
    return train // divisor
