"""The share of right answers on held-out data, where a task has some (synthetic data): counted while the loss is computed.

An engine computes the loss on the ranks of its last stage; a `AnswerCounts` that the objective carries looks at the same logits
when gradients are off, and the evaluation asks for the sum over all ranks. So no engine knows of it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.parallel.collectives import all_reduce


def predicted(logits: Tensor, group: ProcessGroup | None) -> Tensor:
    """The id with the largest logit, the smallest of equals: [...] from [..., n_local].

    group: tensor-parallel group over which the vocabulary is cut into equal columns; None: it is whole.
    """
    peak, index = logits.float().max(-1)
    if group is None:
        return index
    highest = all_reduce(peak, group, dist.ReduceOp.MAX)
    rows = logits.shape[-1] * dist.get_world_size(group)
    index = index + logits.shape[-1] * dist.get_rank(group)
    return all_reduce(index.masked_fill(peak < highest, rows), group, dist.ReduceOp.MIN)


class AnswerCounts:
    """Right and asked positions since the last `take`. group: set to the tensor-parallel group once it exists."""

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group
        self._sums: Tensor | None = None

    def look(self, logits: Tensor, labels: Tensor, loss_mask: Tensor | None) -> None:
        """Count one micro batch, unless it is one of training. logits [b, s, n_local]; labels, loss_mask [b, s]."""
        if torch.is_grad_enabled():
            return
        asked = torch.ones_like(labels, dtype=torch.bool) if loss_mask is None else loss_mask > 0
        right = (predicted(logits, self.group) == labels) & asked
        sums = torch.stack([right.sum(), asked.sum()]).double()
        self._sums = sums if self._sums is None else self._sums + sums

    def take(self, device: torch.device) -> float | None:
        """Right / asked over all ranks, and start again; every rank calls it. None where nothing was asked."""
        sums = torch.zeros(2, dtype=torch.float64) if self._sums is None else self._sums
        self._sums = None
        group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
        right, asked = all_reduce(sums.to(device), group).tolist()
        return right / asked if asked else None
