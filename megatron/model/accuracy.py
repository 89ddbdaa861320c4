"""Right answers of a synthetic task, counted from the logits that the loss is computed from."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.parallel.collectives import all_reduce

ANSWER_COUNTS = ("right_answers", "answers")
"""Names of what `count_answers` returns."""


def predicted(logits: Tensor, group: ProcessGroup | None) -> Tensor:
    """The id with the largest logit, the smallest of equal ones: [...] from [..., n_local].

    Args:
        logits: this rank's columns of the vocabulary.
        group: tensor-parallel group over which the vocabulary is split into equal columns; None for one device.
    """
    peak, index = logits.float().max(-1)
    if group is None:
        return index
    highest = all_reduce(peak, group, dist.ReduceOp.MAX)
    rows = logits.shape[-1] * dist.get_world_size(group)
    index = index + logits.shape[-1] * dist.get_rank(group)
    return all_reduce(index.masked_fill(peak < highest, rows), group, dist.ReduceOp.MIN)


def count_answers(
    logits: Tensor, labels: Tensor, loss_mask: Tensor | None, group: ProcessGroup | None = None
) -> dict[str, Tensor]:
    """Right and all answers of one micro batch, scalars in fp64.

    Args:
        logits: [b, s, n_local], this rank's columns.
        labels: [b, s].
        loss_mask: [b, s], above 0 where an answer is expected; None: everywhere.
        group: as in `predicted`.
    """
    expected = torch.ones_like(labels, dtype=torch.bool) if loss_mask is None else loss_mask > 0
    right = (predicted(logits, group) == labels) & expected
    return {"right_answers": right.sum().double(), "answers": expected.sum().double()}
