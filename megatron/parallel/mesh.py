"""The device mesh: pipeline x data x tensor parallel ranks, and the process groups along its three axes.

Only this file and DeepSpeed create mesh groups. Ranks are ordered as in GPT-NeoX, tensor fastest:
`rank = (pp_rank * dp + dp_rank) * tp + tp_rank`. The group of an axis of size 1 is None, so one process needs no process group.

Context parallelism is the fastest part of the data axis: `cp` neighbouring replicas hold shards of the same samples. So `dp`
counts the model's replicas, over which gradients are averaged and ZeRO shards its state, and `data_size = dp / cp` of them read
different samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from megatron.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def rank_of(pp_rank: int, dp_rank: int, tp_rank: int, *, dp: int, tp: int) -> int:
    """Global rank of a mesh position."""
    return (pp_rank * dp + dp_rank) * tp + tp_rank


def data_parallel_size(world_size: int, pp: int, tp: int, cp: int = 1) -> int:
    """Number of model replicas in `world_size` processes, a multiple of the context-parallel size `cp`.

    Raises:
        ConfigError: `world_size` is not a multiple of `pp * tp * cp`, or a size is below 1.
    """
    if min(pp, tp, cp) < 1:
        raise ConfigError(f"parallel sizes must be at least 1, got pipeline {pp}, context {cp} and tensor {tp}")
    if cp > 1 and world_size % (pp * tp * cp):
        raise ConfigError(
            f"{world_size} processes cannot hold pipeline {pp} x context {cp} x tensor {tp}",
            why="they must be a multiple of pipe_parallel_size x context_parallel_size x model_parallel_size",
            hint=f"start {pp * tp * cp} processes or a multiple of it, or lower context_parallel_size",
        )
    if world_size % (pp * tp):
        raise ConfigError(
            f"{world_size} processes cannot hold pipeline {pp} x tensor {tp}",
            why="the number of processes must be a multiple of pipe_parallel_size x model_parallel_size",
            hint=f"start {pp * tp} processes or a multiple of it, or change pipe_parallel_size / model_parallel_size",
        )
    return world_size // (pp * tp)


@dataclass(frozen=True)
class Mesh:
    """One process's position in the mesh.

    Attributes:
        pp: pipeline-parallel size.
        dp: data-parallel size: replicas of the model, context-parallel ones included.
        tp: tensor-parallel size.
        rank: global rank.
        pp_group: this rank's pipeline group; None if `pp` is 1.
        dp_group: this rank's data-parallel group; None if `dp` is 1.
        tp_group: this rank's tensor-parallel group; None if `tp` is 1.
        cp: context-parallel size, a divisor of `dp`.
        cp_group: this rank's context-parallel group; None if `cp` is 1.
    """

    pp: int
    dp: int
    tp: int
    rank: int
    pp_group: ProcessGroup | None = None
    dp_group: ProcessGroup | None = None
    tp_group: ProcessGroup | None = None
    cp: int = 1
    cp_group: ProcessGroup | None = None

    @property
    def world_size(self) -> int:
        """Processes in the mesh."""
        return self.pp * self.dp * self.tp

    @property
    def tp_rank(self) -> int:
        """Rank along the tensor axis."""
        return self.rank % self.tp

    @property
    def dp_rank(self) -> int:
        """Rank along the data axis."""
        return self.rank // self.tp % self.dp

    @property
    def cp_rank(self) -> int:
        """Place of this rank's shard in the rows of its samples."""
        return self.dp_rank % self.cp

    @property
    def data_rank(self) -> int:
        """Which samples this rank reads, of `data_size`."""
        return self.dp_rank // self.cp

    @property
    def data_size(self) -> int:
        """Ranks along the data axis that read different samples."""
        return self.dp // self.cp

    @property
    def pp_rank(self) -> int:
        """Pipeline stage."""
        return self.rank // (self.tp * self.dp)

    @classmethod
    def single(cls) -> Mesh:
        """The mesh of one process, without process groups."""
        return cls(1, 1, 1, 0)

    @classmethod
    def shape_only(cls, pp: int, tp: int, world_size: int, rank: int, cp: int = 1) -> Mesh:
        """A position in a mesh without process groups, for planning (dry run, resharding, estimates)."""
        return cls(pp, data_parallel_size(world_size, pp, tp, cp), tp, rank, cp=cp)

    @classmethod
    def create(cls, pp: int, tp: int, world_size: int, rank: int, timeout_s: float | None = None, cp: int = 1) -> Mesh:
        """Create the groups of all axes; every process of the default group must call this with the same sizes.

        Args:
            pp: pipeline-parallel size.
            tp: tensor-parallel size.
            world_size: of the default process group.
            rank: in the default process group.
            timeout_s: seconds after which a collective of these groups fails; None is torch's default, which
                `launch.environment.init_process_group` sets.
            cp: context-parallel size.

        Raises:
            ConfigError: the sizes do not divide the number of processes.
        """
        mesh = cls.shape_only(pp, tp, world_size, rank, cp)
        if world_size == 1:
            return mesh
        timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
        groups = {axis: _own_group(lists, rank, timeout) for axis, lists in mesh.axis_ranks().items()}
        return cls(pp, mesh.dp, tp, rank, groups["pp"], groups["dp"], groups["tp"], cp, groups["cp"])

    def axis_ranks(self) -> dict[str, list[list[int]]]:
        """Axis name -> the rank lists of all its groups, in the same order on every process."""
        pps, dps, tps, cps = range(self.pp), range(self.dp), range(self.tp), range(self.cp)

        def at(p: int, d: int, t: int) -> int:
            return rank_of(p, d, t, dp=self.dp, tp=self.tp)

        return {
            "pp": [[at(p, d, t) for p in pps] for d in dps for t in tps],
            "dp": [[at(p, d, t) for d in dps] for p in pps for t in tps],
            "tp": [[at(p, d, t) for t in tps] for p in pps for d in dps],
            "cp": [[at(p, d + c, t) for c in cps] for p in pps for d in dps[:: self.cp] for t in tps],
        }

    def describe(self) -> str:
        """`4 processes = 2 pipeline x 1 data x 2 tensor`; with context parallelism `8 processes = ... x 2 context x ...`."""
        word = "process" if self.world_size == 1 else "processes"
        data = f"{self.dp} data" if self.cp == 1 else f"{self.data_size} data x {self.cp} context"
        return f"{self.world_size} {word} = {self.pp} pipeline x {data} x {self.tp} tensor"


def _own_group(rank_lists: list[list[int]], rank: int, timeout: timedelta | None) -> ProcessGroup | None:
    """Create the groups of one axis and return this rank's; None for an axis of size 1."""
    if len(rank_lists[0]) == 1:
        return None
    import torch.distributed as dist  # here, so that planning a mesh (deepy.py, dry runs) needs no torch

    own_group = None
    for ranks in rank_lists:
        group = dist.new_group(ranks, timeout=timeout)
        if rank in ranks:
            own_group = group
    return own_group


def set_default_timeout(seconds: float) -> None:
    """Set the default timeout of every process group that is created from now on, by any library.

    DeepSpeed creates its groups without a timeout and would get torch's 30 minutes, however short the default group's is: a
    broken connection then hangs the job in a subgroup long after the main group has given up.
    """
    import torch.distributed.distributed_c10d as c10d

    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        if isinstance(getattr(c10d, name, None), timedelta):  # the second one is None in a torch without NCCL
            setattr(c10d, name, timedelta(seconds=seconds))
