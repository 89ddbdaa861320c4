"""The grid of processes: pipeline x data x tensor, and the process groups along its three axes.

This file is the only owner of process groups besides DeepSpeed's own. Ranks are laid out as in GPT-NeoX, tensor fastest:
`rank = (pp_rank * dp + dp_rank) * tp + tp_rank`. One process needs no process group at all: every group is then None, and so is
the group of an axis of size 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from megatron.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def rank_of(pp_rank: int, dp_rank: int, tp_rank: int, *, dp: int, tp: int) -> int:
    """Global rank of a grid point."""
    return (pp_rank * dp + dp_rank) * tp + tp_rank


def data_parallel_size(world_size: int, pp: int, tp: int) -> int:
    """How many copies of the model `world_size` processes hold.

    Raises:
        ConfigError: `world_size` is not a multiple of `pp * tp`, or a size is below 1.
    """
    if pp < 1 or tp < 1:
        raise ConfigError(f"parallel sizes must be at least 1, got pipeline {pp} and tensor {tp}")
    if world_size % (pp * tp):
        raise ConfigError(
            f"{world_size} processes cannot hold pipeline {pp} x tensor {tp}",
            why="the number of processes must be a multiple of pipe_parallel_size x model_parallel_size",
            hint=f"start {pp * tp} processes or a multiple of it, or change pipe_parallel_size / model_parallel_size",
        )
    return world_size // (pp * tp)


@dataclass(frozen=True)
class Mesh:
    """One process's place in the grid. A group is None when its axis has one process."""

    pp: int
    dp: int
    tp: int
    rank: int
    pp_group: ProcessGroup | None = None
    dp_group: ProcessGroup | None = None
    tp_group: ProcessGroup | None = None

    @property
    def world_size(self) -> int:
        """Processes in the grid."""
        return self.pp * self.dp * self.tp

    @property
    def tp_rank(self) -> int:
        """Place along the tensor axis."""
        return self.rank % self.tp

    @property
    def dp_rank(self) -> int:
        """Place along the data axis."""
        return self.rank // self.tp % self.dp

    @property
    def pp_rank(self) -> int:
        """Pipeline stage."""
        return self.rank // (self.tp * self.dp)

    @classmethod
    def single(cls) -> Mesh:
        """The grid of one process, without process groups."""
        return cls(1, 1, 1, 0)

    @classmethod
    def shape_only(cls, pp: int, tp: int, world_size: int, rank: int) -> Mesh:
        """A place in a grid without process groups: for planning (dry run, resharding, estimates)."""
        return cls(pp, data_parallel_size(world_size, pp, tp), tp, rank)

    @classmethod
    def create(cls, pp: int, tp: int, world_size: int, rank: int, timeout_s: float | None = None) -> Mesh:
        """Make the groups of all axes; every process of the default group must call this, with the same sizes.

        Args:
            pp, tp: pipeline and tensor sizes. world_size, rank: of the default process group.
            timeout_s: seconds after which a collective of these groups fails; None takes torch's default, which
                `launch.environment.init_process_group` sets.

        Raises:
            ConfigError: the sizes do not divide the number of processes.
        """
        mesh = cls.shape_only(pp, tp, world_size, rank)
        if world_size == 1:
            return mesh
        timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
        groups = {axis: _own_group(lists, rank, timeout) for axis, lists in mesh.axis_ranks().items()}
        return cls(pp, mesh.dp, tp, rank, groups["pp"], groups["dp"], groups["tp"])

    def axis_ranks(self) -> dict[str, list[list[int]]]:
        """Axis name -> the rank lists of all its groups, in an order that is the same on every process."""
        pps, dps, tps = range(self.pp), range(self.dp), range(self.tp)

        def at(p: int, d: int, t: int) -> int:
            return rank_of(p, d, t, dp=self.dp, tp=self.tp)

        return {
            "pp": [[at(p, d, t) for p in pps] for d in dps for t in tps],
            "dp": [[at(p, d, t) for d in dps] for p in pps for t in tps],
            "tp": [[at(p, d, t) for t in tps] for p in pps for d in dps],
        }

    def describe(self) -> str:
        """`4 processes = 2 pipeline x 1 data x 2 tensor`."""
        word = "process" if self.world_size == 1 else "processes"
        return f"{self.world_size} {word} = {self.pp} pipeline x {self.dp} data x {self.tp} tensor"


def _own_group(rank_lists: list[list[int]], rank: int, timeout: timedelta | None) -> ProcessGroup | None:
    """Create the groups of one axis and return the caller's; none is made for an axis of size 1."""
    if len(rank_lists[0]) == 1:
        return None
    import torch.distributed as dist  # here, so that planning a mesh (deepy.py, dry runs) needs no torch

    own = None
    for ranks in rank_lists:
        group = dist.new_group(ranks, timeout=timeout)
        if rank in ranks:
            own = group
    return own


def set_default_timeout(seconds: float) -> None:
    """Make `seconds` the timeout of every process group made from now on, whoever makes it.

    DeepSpeed makes its groups without one and would get torch's 30 minutes, however short the default group's is: a cut
    network cable then hangs the job in a sub-group long after the main group gave up.
    """
    import torch.distributed.distributed_c10d as c10d

    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        if isinstance(getattr(c10d, name, None), timedelta):  # the second is None in a torch without NCCL
            setattr(c10d, name, timedelta(seconds=seconds))
