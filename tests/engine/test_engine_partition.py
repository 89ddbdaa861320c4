"""Stages of a pipeline against every way to cut them, blocks by name, and how many blocks a recomputed piece has."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from megatron.engine import stages
from megatron.engine.base import EngineSettings
from megatron.engine.stages import balanced_bounds, check_mesh, run_stages, stage_costs
from megatron.errors import ConfigError
from megatron.model.build import build_model
from megatron.model.config import ModelConfig
from megatron.model.stages import stages_of
from megatron.parallel.mesh import Mesh


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


def test_as_many_stages_as_blocks_are_possible() -> None:
    config = ModelConfig(32, 16, 2, 2, 24, ("metala", "metala"))
    check_mesh(config, Mesh.shape_only(2, 1, 2, 0))
    with pytest.raises(ConfigError, match="2 layers cannot fill 3 pipeline stages"):
        check_mesh(config, Mesh.shape_only(3, 1, 3, 0))


@pytest.mark.parametrize(("interval", "pieces"), [(1, [1] * 5), (2, [2, 2, 1]), (3, [3, 2]), (9, [5])])
def test_recomputed_pieces_have_as_many_blocks_as_asked_for(
    interval: int, pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def counted(function: Any, piece: Sequence[Any], *activations: Any, **_: Any) -> Any:
        seen.append(len(piece))
        return function(piece, *activations)

    monkeypatch.setattr(stages, "checkpoint", counted)
    config = ModelConfig(32, 16, 5, 2, 24, ("metala",) * 5)
    local = stages.build_local(config, Mesh.single(), EngineSettings(), torch.device("cpu"))
    run_stages(local.stages, (torch.zeros(1, 4, dtype=torch.long),), interval)
    assert seen == pieces
