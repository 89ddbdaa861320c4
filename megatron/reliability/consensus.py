"""One small vote of all ranks on the CPU, so that what any of them has noticed becomes everybody's decision.

Signals, the clock and slow data are known to single ranks; acting on them alone would leave the others in a collective for
ever. The votes travel in a gloo group of their own: no accelerator is waited for, and no other collective is met.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Consensus:
    """`group` None: one process, whose vote is the result."""

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self._group = group

    @classmethod
    def of_all_ranks(cls) -> Consensus:
        """Make the group; every rank of the default process group calls this at the same place."""
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        return cls(dist.new_group(backend="gloo"))

    @property
    def alone(self) -> bool:
        """Whether there is nobody else to ask."""
        return self._group is None

    def reduce_max(self, values: Sequence[int]) -> list[int]:
        """The largest of all ranks' values, place by place; every rank calls this with as many values."""
        if self._group is None:
            return list(values)
        import torch
        import torch.distributed as dist

        votes = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._group)
        return [int(v) for v in votes.tolist()]

    def gather(self, values: Sequence[int]) -> list[list[int]]:
        """Every rank's values in rank order; as many values on each rank."""
        if self._group is None:
            return [list(values)]
        import torch
        import torch.distributed as dist

        own = torch.tensor(values, dtype=torch.int64)
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(parts, own, group=self._group)
        return [part.tolist() for part in parts]
