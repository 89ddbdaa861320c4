"""Vocabulary-parallel cross entropy in fp32, without gathering the logits.

Each rank holds the logits of its vocabulary shard. The forward needs two all-reduces of `[b, s]` numbers (the maximum; then the
target's logit and the sum of exponentials together), the backward none. Without a group it is the ordinary loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.errors import DataError
from megatron.ops.precision import outside_autocast
from megatron.parallel.collectives import all_reduce


@outside_autocast
class _CrossEntropy(torch.autograd.Function):
    """logits_local [t, n_local], labels [t] (global ids) -> losses [t], fp32."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, first: int, group: ProcessGroup | None) -> Tensor:
        x = logits.float()
        peak = all_reduce(x.amax(-1), group, dist.ReduceOp.MAX)
        exp = (x - peak[:, None]).exp_()
        local = labels - first
        outside = (local < 0) | (local >= x.shape[-1])
        local = local.masked_fill(outside, 0)
        target = (x.gather(-1, local[:, None]).squeeze(-1) - peak).masked_fill(outside, 0.0)
        target, total = all_reduce(torch.stack((target, exp.sum(-1))), group)
        # Normalized here, so that backward only scales: the softmax is the only saved [t, n_local] tensor.
        ctx.save_for_backward(exp.div_(total[:, None]), local, outside)
        ctx.dtype = logits.dtype
        return total.log() - target

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        softmax, local, outside = ctx.saved_tensors
        grad = softmax * grads[0][:, None]
        hit = torch.where(outside, 0.0, -grads[0])
        grad.scatter_add_(-1, local[:, None], hit[:, None])
        return grad.to(ctx.dtype), None, None, None


def check_labels(labels: Tensor, loss_mask: Tensor, vocab_size: int) -> None:
    """On a CPU, refuse counted label ids outside the padded vocabulary.

    On a GPU nothing is checked, because that would synchronize at every micro batch; the data is checked when it is read.

    Args:
        labels: global ids.
        loss_mask: of the same shape; ids with a positive weight are checked.
        vocab_size: padded vocabulary size.

    Raises:
        DataError: it names the first invalid id.
    """
    if labels.device.type != "cpu":
        return
    invalid = ((labels < 0) | (labels >= vocab_size)) & (loss_mask > 0)
    if bool(invalid.any()):
        raise DataError(
            f"label id {int(labels[invalid][0])} is outside the vocabulary of {vocab_size} rows",
            why="the data was tokenized with another tokenizer, or the vocabulary size of the config is too small",
            hint="check tokenizer_type and vocab_file against the ones used for data_path",
        )


def vocab_parallel_token_loss(logits_local: Tensor, labels: Tensor, loss_mask: Tensor, group: ProcessGroup | None) -> Tensor:
    """Mean cross entropy over the counted tokens: `sum(mask * ce) / sum(mask)`, the same scalar on every rank of the group.

    Args:
        logits_local: [b, s, n / tp], logits of this rank's vocabulary shard.
        labels: [b, s] global ids.
        loss_mask: [b, s], 1 counts.
        group: tensor-parallel group; None for one device.

    Raises:
        DataError: a counted label is outside the padded vocabulary (on a CPU).
    """
    size, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    width = logits_local.shape[-1]
    check_labels(labels, loss_mask, width * size)
    flat = logits_local.reshape(-1, width)
    losses = _CrossEntropy.apply(flat, labels.reshape(-1), rank * width, group)
    mask = loss_mask.reshape(-1).float()
    # The clamp gives a micro batch without counted tokens the loss 0, as `model/loss.py` does.
    return (losses * mask).sum() / mask.sum().clamp_min(1e-9)
