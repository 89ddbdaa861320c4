"""Places, groups and random streams of a grid."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron.errors import CheckpointError, ConfigError
from megatron.parallel.mesh import Mesh, rank_of
from megatron.parallel.random import capture_rng, restore_rng, seed_all, stream_seed
from tests.parallel.ranks import run_ranks


def test_rank_order_is_neox() -> None:
    """rank = (pipe * dp + data) * tp + tensor, and back."""
    for rank in range(24):
        mesh = Mesh.shape_only(3, 2, 24, rank)
        assert mesh.dp == 4
        assert rank_of(mesh.pp_rank, mesh.dp_rank, mesh.tp_rank, dp=4, tp=2) == rank
    assert Mesh.shape_only(2, 2, 8, 6).axis_ranks()["tp"][3] == [6, 7]
    assert Mesh.shape_only(2, 2, 8, 0).axis_ranks()["dp"][0] == [0, 2]
    assert Mesh.shape_only(2, 2, 8, 0).axis_ranks()["pp"][0] == [0, 4]


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="6 processes cannot hold pipeline 2 x tensor 2"):
        Mesh.shape_only(2, 2, 6, 0)
    with pytest.raises(ConfigError, match="at least 1"):
        Mesh.shape_only(0, 1, 1, 0)


def test_one_process_needs_no_group() -> None:
    mesh = Mesh.create(1, 1, 1, 0)
    assert mesh == Mesh.single()
    assert mesh.tp_group is None


def _sums() -> list[float]:
    rank = dist.get_rank()
    mesh = Mesh.create(2, 2, 4, rank)
    assert mesh.dp_group is None
    out = []
    for group in (mesh.pp_group, mesh.tp_group):
        x = torch.tensor([float(rank)])
        dist.all_reduce(x, group=group)
        out.append(x.item())
    return out


def test_groups_join_the_right_ranks() -> None:
    assert run_ranks(_sums, 4) == [[2.0, 1.0], [4.0, 1.0], [2.0, 5.0], [4.0, 5.0]]


def test_streams_agree_over_tensor_ranks_and_differ_elsewhere() -> None:
    seeds = {rank: stream_seed(1234, Mesh.shape_only(2, 2, 8, rank)) for rank in range(8)}
    assert all(seeds[rank] == seeds[rank + 1] for rank in range(0, 8, 2))
    assert len(set(seeds.values())) == 4


def test_random_state_round_trip() -> None:
    seed_all(7, Mesh.single())
    random.gauss(0, 1), np.random.randn(3), torch.randn(3)
    state = capture_rng()
    assert all(isinstance(value, torch.Tensor) for value in state.values())

    def draw() -> tuple[float, list[float], list[float]]:
        return random.gauss(0, 1), np.random.randn(3).tolist(), torch.randn(3).tolist()

    first = draw()
    draw()
    restore_rng(state)
    assert draw() == first
    with pytest.raises(CheckpointError):
        restore_rng({"torch": state["torch"]})
