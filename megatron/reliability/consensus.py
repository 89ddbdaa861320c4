"""Consensus: small all-reduces on the CPU, so that what one rank has noticed becomes a decision of all ranks.

Single ranks notice signals, the time limit and slow data; a rank that acts alone leaves the others in a collective forever.
The flags travel in a separate gloo group: nobody waits for an accelerator, and no other collective interleaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Consensus:
    """Reductions over a group; None is a single process, whose values are the result."""

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self._group = group

    @classmethod
    def of_all_ranks(cls) -> Consensus:
        """Create the group; every rank of the default process group calls this at the same point."""
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        return cls(dist.new_group(backend="gloo"))

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self._group is None

    def reduce_max(self, values: Sequence[int]) -> list[int]:
        """Elementwise maximum over all ranks; every rank calls this with the same number of values."""
        if self._group is None:
            return list(values)
        import torch
        import torch.distributed as dist

        flags = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        return [int(flag) for flag in flags.tolist()]

    def gather(self, values: Sequence[int]) -> list[list[int]]:
        """Every rank's values in rank order; every rank passes the same number."""
        if self._group is None:
            return [list(values)]
        import torch
        import torch.distributed as dist

        local = torch.tensor(values, dtype=torch.int64)
        gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(gathered, local, group=self._group)
        return [row.tolist() for row in gathered]
