"""Blends: NeoX's choices bit for bit, by an algorithm that must equal the slow one for any weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data import blend as module
from megatron.data.blend import blend, normalise, samples_per_dataset
from megatron.errors import DataError


def one_by_one(weights: Sequence[float], size: int) -> list[int]:
    """The rule as a plain loop: the corpus furthest behind its share, the first of equals."""
    shares = normalise(weights)
    counts, chosen = [0] * len(shares), []
    for step in range(size):
        behind = [share * float(max(step, 1)) - count for share, count in zip(shares, counts, strict=True)]
        best = behind.index(max(behind))
        counts[best] += 1
        chosen.append(best)
    return chosen


def test_golden_blends(golden: Path, golden_json: Callable[[str], Any]) -> None:
    cases = golden_json("blend/manifest.json")["cases"]
    assert len(cases) == 10
    for case in cases:
        chosen, within = blend(case["weights"], case["size"])
        made: dict[str, np.ndarray[Any, Any]] = {"index": chosen, "sample_index": within}
        for kind, array in made.items():
            expected = np.load(golden / f"blend/{case['id']}_dataset_{kind}.npy")
            assert array.dtype == expected.dtype and np.array_equal(array, expected), case["id"]


def test_counts_per_dataset(golden_json: Callable[[str], Any]) -> None:
    for case in golden_json("blend/normalized_weights_and_num_samples.json"):
        if "error" in case:
            with pytest.raises(DataError):
                normalise(case["weights"])
            continue
        assert normalise(case["weights"]).tolist() == case["normalised"]
        if case["num_samples"] is not None:
            assert samples_per_dataset(case["weights"], case["num_samples"]) == case["per_dataset"]


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.floats(0, 1) | st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 0.5, 1.0]), min_size=1, max_size=6),
    size=st.integers(0, 3000),
    lanes=st.sampled_from([1, 2, 7, 64]),
)
def test_lanes_equal_the_loop(weights: list[float], size: int, lanes: int) -> None:
    if sum(weights) <= 0:
        weights = [*weights, 1.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MAX_LANES", lanes)
        patch.setattr(module, "_MIN_STEPS", 1)
        patch.setattr(module, "_CHUNK", 700)
        chosen, within = blend(weights, size)
    expected = one_by_one(weights, size)
    assert chosen.tolist() == expected
    for d in set(expected):
        assert within[chosen == d].tolist() == list(range(int((chosen == d).sum())))


@pytest.mark.parametrize("weights", [[1e-6, 0.4, 0.6], [1.0, 0.0, 3.0], list(np.random.RandomState(3).rand(20) ** 3)])
def test_many_lanes_equal_the_loop(weights: list[float]) -> None:
    assert blend(weights, 30_000)[0].tolist() == one_by_one(weights, 30_000)


def test_estimates_are_only_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def useless(shares: Any, steps: Any) -> Any:
        counts = np.zeros((len(shares), len(steps)))
        counts[0] = steps
        counts[0, 0] = 0
        return counts

    monkeypatch.setattr(module, "_estimated_counts", useless)
    assert blend([0.2, 0.5, 0.3], 4000)[0].tolist() == one_by_one([0.2, 0.5, 0.3], 4000)


def test_a_shorter_blend_is_the_beginning_of_a_longer_one() -> None:
    long, short = blend([3, 1, 2], 5000), blend([3, 1, 2], 777)
    assert np.array_equal(long[0][:777], short[0]) and np.array_equal(long[1][:777], short[1])


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0], [float("inf")], [1.0] * 256])
def test_impossible_weights(weights: list[float]) -> None:
    with pytest.raises(DataError):
        blend(weights, 10)
