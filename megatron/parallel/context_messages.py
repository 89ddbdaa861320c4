"""The messages of context parallelism: collectives and neighbour exchanges of plain tensors, without a graph.

A message that can travel while the rank computes is started by `start_*`, which returns a function that waits for the result.
Every message involves all ranks of the group, which start them in the same order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import P2POp, ProcessGroup, irecv, isend

Wait = Callable[[], Tensor]


class ContextMessages:
    """One rank of a context-parallel group.

    Attributes:
        group: the context-parallel group; None is the default group.
        rank: rank in the group.
        size: ranks of the group, P.
    """

    def __init__(self, group: ProcessGroup | None, rank: int, size: int) -> None:
        self.group, self.rank, self.size = group, rank, size

    def start_all_gather(self, x: Tensor) -> Wait:
        """`x [n]` of each rank -> [P, n], in the order of the shards."""
        gathered = x.new_empty(self.size, *x.shape)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
        work = gather(gathered.flatten(0, 1), x, group=self.group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return gathered

        return wait

    def start_shift(self, x: Tensor, by: int) -> Wait:
        """The contiguous `x` of rank - `by`; zeros on ranks that have no such neighbour."""
        received, messages = torch.zeros_like(x), []
        if 0 <= self.rank + by < self.size:
            messages.append(P2POp(isend, x, self._global(self.rank + by), self.group))
        if 0 <= self.rank - by < self.size:
            messages.append(P2POp(irecv, received, self._global(self.rank - by), self.group))
        works = dist.batch_isend_irecv(messages) if messages else []

        def wait() -> Tensor:
            for work in works:
                work.wait()
            return received

        return wait

    def all_to_all(self, blocks: Tensor) -> Tensor:
        """Block r of the contiguous `blocks [P, ...]` goes to rank r -> the blocks that the ranks sent here, [P, ...]."""
        received = torch.empty_like(blocks)
        dist.all_to_all_single(received, blocks, group=self.group)
        return received

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in a new tensor."""
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)
