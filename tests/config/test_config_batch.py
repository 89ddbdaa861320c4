"""Batch sizes: the original's inference wherever it accepts, and one case more (accumulation steps unset)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config import key_types
from megatron.config.batch import BatchError, BatchSizes, solve_batch

_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def _plain(values: list[Any]) -> bool:
    """Whole numbers or absent; anything else is refused as a type before batch sizes are looked at."""
    return all(value is None or (isinstance(value, int) and value > 0) for value in values)


def test_direct_cases(golden: Callable[[str], Any]) -> None:
    compared = 0
    for dp, train, micro, gas, derived, error in golden("batch_params.json")["direct"]:
        if not _plain([train, micro, gas]) or not dp or dp != int(dp):
            continue
        compared += 1
        try:
            ours = solve_batch(int(dp), train or 0, micro or 0, gas or 0)
        except BatchError:
            assert error is not None, (dp, train, micro, gas)
        else:
            assert error is None, (dp, train, micro, gas)
            assert [ours.train, ours.micro, ours.accumulation] == [int(value) for value in derived]
    assert compared > 150


def test_whole_constructor(golden: Callable[[str], Any], load_values: Callable[..., Any]) -> None:
    """The same through YAML and world size; where accumulation steps are not written, we may accept more."""
    accepted = superset = 0
    for case in golden("batch_params.json")["via_full_config"]:
        given_values = case["input"]
        cells = max(1, given_values["pipe_parallel_size"]) * max(1, given_values["model_parallel_size"])
        world = given_values["global_num_gpus"]
        # 32.0 counts as 32, as the reader makes it.
        sizes = [key_types.fit(given_values.get(key), int) for key in _KEYS]
        if not _plain(sizes) or not world or world % cells or not any(sizes[:2]):
            assert "error" in case
            continue
        try:
            ours = solve_batch(world // cells, *(size or 0 for size in sizes))
        except BatchError:
            assert "error" in case, given_values
            continue
        if "error" in case:
            assert "gradient_accumulation_steps" not in given_values, given_values
            superset += 1
        else:
            expected = [case["result"][key] for key in _KEYS]
            assert [ours.train, ours.micro, ours.accumulation] == expected, given_values
            accepted += 1
    assert accepted > 50 and superset > 0
    run = load_values({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4}, world_size=2)
    assert run.batch.gradient_accumulation_steps == 4
    assert run.provenance["gradient_accumulation_steps"].startswith("derived")


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64), st.integers(0, 7))
def test_any_solvable_subset_gives_the_same_sizes(dp: int, micro: int, gas: int, hide: int) -> None:
    whole = BatchSizes(dp * micro * gas, micro, gas)
    train_in, micro_in, gas_in = (0 if hide & bit else v for bit, v in ((1, whole.train), (2, micro), (4, gas)))
    if sum(v == 0 for v in (train_in, micro_in, gas_in)) <= 1:
        assert solve_batch(dp, train_in, micro_in, gas_in) == whole
    elif train_in or micro_in:
        solved = solve_batch(dp, train_in, micro_in, gas_in)
        assert solved.train == solved.micro * solved.accumulation * dp and solved.accumulation == 1
    else:
        with pytest.raises(BatchError, match="is needed"):
            solve_batch(dp, train_in, micro_in, gas_in)


def test_message_shows_the_product() -> None:
    with pytest.raises(BatchError, match=r"train_batch_size 32 is not .* 4 x .* 2 x data-parallel size 1 = 8"):
        solve_batch(1, 32, 4, 2)
