"""Cross entropy over logits whose vocabulary is split over tensor-parallel ranks, without gathering the logits.

Each rank holds the columns of its own vocabulary rows. Two all-reduces of one or two numbers per token (the maximum; then the
target's logit and the sum of exponentials together) are enough forward, and none is needed backward.
"""

from __future__ import annotations

from functools import partial

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.errors import DataError
from megatron.model.loss import token_loss
from megatron.parallel.collectives import all_reduce


def check_labels(labels: Tensor, loss_mask: Tensor | None, vocab_size: int) -> None:
    """On a CPU, refuse label ids outside the padded vocabulary where the mask counts them; -100 never counts.

    On a GPU nothing is checked: it would wait for the device at every micro batch, and the data are checked before the run.

    Raises:
        DataError: with the first bad id.
    """
    if labels.device.type != "cpu":
        return
    bad = ((labels < 0) | (labels >= vocab_size)) & (labels != -100)
    if loss_mask is not None:
        bad &= loss_mask > 0
    if bool(bad.any()):
        raise DataError(
            f"label id {int(labels[bad][0])} is outside the vocabulary of {vocab_size} rows",
            why="the data were made with another tokenizer, or the vocabulary size of the config is too small",
            hint="check tokenizer_type and vocab_file against the ones used for data_path",
        )


def _reduce(x: Tensor, how: str, group: ProcessGroup) -> Tensor:
    return all_reduce(x, group, dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM)


def vocab_parallel_token_loss(
    logits_local: Tensor, labels: Tensor, loss_mask: Tensor | None, group: ProcessGroup | None
) -> Tensor:
    """`token_loss` of one rank's columns of the logits: the same scalar on every rank of the group.

    Args:
        logits_local: [b, s, n / tp], this rank's columns.
        labels: [b, s] ids of the whole vocabulary, -100 = ignored.
        loss_mask: [b, s] of weights; None for all ones.
        group: tensor-parallel group; None for one device.

    Raises:
        DataError: a counted label is outside the padded vocabulary (on a CPU).
    """
    columns = logits_local.shape[-1]
    if group is None:
        check_labels(labels, loss_mask, columns)
        return token_loss(logits_local, labels, loss_mask)
    check_labels(labels, loss_mask, columns * dist.get_world_size(group))
    return token_loss(logits_local, labels, loss_mask, dist.get_rank(group) * columns, partial(_reduce, group=group))
