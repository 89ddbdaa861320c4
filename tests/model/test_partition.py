"""Stages of a pipeline against every way to divide them, blocks by name, and the partition that needs no model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

from megatron.errors import ConfigError
from megatron.model.build import build_model, param_specs
from megatron.model.config import ModelConfig
from megatron.model.partition import balanced_bounds, block_bounds, stage_costs, stage_ranks
from megatron.model.stages import stages_of


def _judged(costs: Sequence[float], bounds: Sequence[int]) -> tuple[float, float]:
    """(the largest part, the sum of squares)."""
    parts = [sum(costs[a:b]) for a, b in itertools.pairwise(bounds)]
    return max(parts), sum(part * part for part in parts)


@pytest.mark.parametrize(
    ("costs", "parts"),
    [
        ([1.0] * 7, 3),
        ([0.0, *[1.0] * 10, 0.0, 0.0], 4),
        ([0.0, 5.0, 1.0, 1.0, 0.0], 3),
        ([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0], 4),
        ([9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 3),
        ([100.0, *[7.0] * 6, 120.0], 5),
    ],
)
def test_the_largest_part_is_as_small_as_can_be_and_the_others_are_even(costs: list[float], parts: int) -> None:
    inner = itertools.combinations(range(1, len(costs)), parts - 1)
    cuts = [(0, *cut, len(costs)) for cut in inner]
    best = min(_judged(costs, cut) for cut in cuts if all(sum(costs[a:b]) > 0 for a, b in itertools.pairwise(cut)))
    found = balanced_bounds(costs, parts)
    assert (found[0], found[-1], len(found)) == (0, len(costs), parts + 1)
    assert _judged(costs, found) == best


def test_blocks_are_chosen_by_the_name_of_their_mixer() -> None:
    """`flash` is a name of softmax attention that its class does not have."""
    config = ModelConfig(32, 16, 3, 2, 24, ("metala", "flash", "mamba"))
    with torch.device("meta"):
        every = stages_of(build_model(config))
    assert stage_costs("type:flash", every, config) == [0, 0, 1, 0, 0, 0]
    assert stage_costs("type:metala|mamba", every, config) == [0, 1, 0, 1, 0, 0]
    assert stage_costs("type:transformer|mlp", every, config) == [0, 1, 1, 1, 0, 0]
    assert stage_costs("uniform", every, config) == [1] * 6


def test_pipeline_bounds() -> None:
    assert balanced_bounds([0, 1, 1, 1, 1, 0, 0], 2) == [0, 3, 7]
    assert balanced_bounds([0, 1, 1, 1, 1, 1, 0, 0], 2) == [0, 3, 8]
    assert balanced_bounds([1, 2, 3, 9], 2) == [0, 3, 4]
    assert balanced_bounds([5.0], 1) == [0, 1]
    with pytest.raises(ConfigError, match="2 layers cannot fill 3 pipeline stages"):
        balanced_bounds([0, 1, 1, 0], 3)


def test_partition_methods() -> None:
    config = ModelConfig(64, 32, 4, 4, 48, ("metala",) * 4, norm="rmsnorm", tie_embeddings=False)
    with torch.device("meta"):
        stages = stages_of(build_model(config))
    assert stage_costs("type:transformer|mlp", stages, config) == [0, 1, 1, 1, 1, 0, 0]
    assert stage_costs("type:metala", stages, config) == [0, 1, 1, 1, 1, 0, 0]
    assert stage_costs("uniform", stages, config) == [1.0] * 7
    by_size = stage_costs("parameters", stages, config)
    assert by_size[0] == 64 * 32
    assert by_size[5] == 32
    assert by_size[1] > by_size[0]
    for bad in ("type:mamba", "magic"):
        with pytest.raises(ConfigError):
            stage_costs(bad, stages, config)


@pytest.mark.parametrize(("layers", "pp"), [(1, 1), (5, 2), (7, 3), (8, 3), (9, 4), (4, 4)])
def test_without_a_model_it_is_the_partition_of_training(layers: int, pp: int) -> None:
    """Evaluation and offline resharding read the parts that training writes."""
    config = ModelConfig(32, 16, layers, 2, 24, ("metala",) * layers, tie_embeddings=False)
    with torch.device("meta"):
        stages = stages_of(build_model(config))
    bounds = balanced_bounds(stage_costs("type:transformer|mlp", stages, config), pp)
    ranks = stage_ranks([stage.index for stage in stages], layers, pp)
    assert [ranks[stage.index] for stage in stages] == [r for r in range(pp) for _ in range(bounds[r], bounds[r + 1])]
    assert [bound - 1 for bound in bounds[1:-1]] == block_bounds(layers, pp)[1:-1]
    assert {spec.stage for spec in param_specs(config).values()} <= set(ranks)
