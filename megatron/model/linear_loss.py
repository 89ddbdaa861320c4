"""LM head and cross entropy in one, a block of tokens at a time: the logits of a complete batch never exist.

At 50,000 words the logits of a micro batch and their gradient are by far the largest tensors of a step. Here a block of tokens
is multiplied, its loss and the gradient of its logits are formed at once, and both products of the backward follow while the
block is in memory: as many operations as two separate steps, a block's worth of their memory, and one fp32 sum of the matrix's
gradient. Works where the vocabulary is split over ranks, like `model/parallel_loss.py`, with the same two reductions per block.

The gradients are made in the forward, for upstream 1 and with weights brought to at most 1; the backward scales them. So a loss
scale of fp16 acts on them exactly as without this operator.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron.model.loss import token_weights
from megatron.model.parallel_loss import check_labels
from megatron.ops.cross_entropy import row_gradient_, row_stats
from megatron.ops.precision import autocast_dtype, outside_autocast
from megatron.parallel.collectives import all_reduce


def _whole(stats: tuple[Tensor, Tensor, Tensor], group: ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum, sum of exponentials and the label's logit of the whole vocabulary from those of one rank's columns."""
    own, total, picked = stats
    if group is None:
        return stats
    peak = all_reduce(own, group, dist.ReduceOp.MAX)
    total, picked = all_reduce(torch.stack((total * (own - peak).exp(), picked)), group)
    return peak, total, picked


def _accumulate(sum_: Tensor, left: Tensor, right: Tensor) -> None:
    """sum_ [n, d] += left^T right, the sum wider than the factors where they are narrow."""
    if left.dtype == sum_.dtype:
        sum_.addmm_(left.t(), right)
    elif left.device.type == "cuda":
        sum_.add_(torch.mm(left.t(), right, out_dtype=sum_.dtype))
    else:
        sum_.add_(left.t() @ right)


@outside_autocast
class _LinearCrossEntropy(torch.autograd.Function):
    """sum(weights * ce(x @ matrix^T)): x [t, d], matrix [n, d], labels [t] (global; any where the weight is 0), weights [t]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        matrix: Tensor,
        labels: Tensor,
        weights: Tensor,
        group: ProcessGroup | None,
        block: int,
        backend: str,
    ) -> Tensor:
        n = matrix.shape[0]
        local = labels - (0 if group is None else dist.get_rank(group) * n)
        local = torch.where((local >= 0) & (local < n), local, -1)
        unit = weights.amax().clamp_min(torch.finfo(weights.dtype).tiny)
        share = weights / unit
        dx = torch.empty_like(x) if any(ctx.needs_input_grad[:2]) else None
        wide = torch.float64 if matrix.dtype == torch.float64 else torch.float32
        dmatrix = torch.zeros(matrix.shape, dtype=wide, device=matrix.device) if ctx.needs_input_grad[1] else None
        loss = weights.new_zeros(())
        for start in range(0, x.shape[0], block):
            at = slice(start, start + block)
            logits = x[at] @ matrix.t()
            peak, total, picked = _whole(row_stats(logits, local[at], backend), group)
            loss += (torch.where(share[at] == 0, 0.0, total.log() + (peak - picked)) * share[at]).sum()
            if dx is None:
                continue
            row_gradient_(logits, local[at], peak, total, share[at], backend)
            torch.mm(logits, matrix, out=dx[at])
            if dmatrix is not None:
                _accumulate(dmatrix, logits, x[at])
        ctx.dtype = matrix.dtype
        ctx.save_for_backward(unit, dx, dmatrix)
        return loss * unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        unit, dx, dmatrix = ctx.saved_tensors
        factor = upstream * unit
        gradient = None
        if dmatrix is not None:  # rounded as it is scaled: no second fp32 copy
            gradient = torch.mul(dmatrix, factor, out=torch.empty(dmatrix.shape, dtype=ctx.dtype, device=dmatrix.device))
        return torch.mul(dx, factor, out=torch.empty_like(dx)), gradient, None, None, None, None, None


def linear_token_loss(
    x: Tensor,
    matrix: Tensor,
    labels: Tensor,
    loss_mask: Tensor | None,
    group: ProcessGroup | None = None,
    *,
    block: int = 1024,
    backend: str = "auto",
) -> Tensor:
    """Mean cross entropy of `x [b, s, d]` times `matrix [n / tp, d]` over the counted tokens: as `token_loss` of their product.

    Under autocast the product is formed in its format, as any other of its region.

    Args:
        x: hidden states in front of the LM head.
        matrix: this rank's rows of the LM head.
        labels: [b, s] ids of the whole vocabulary, -100 = ignored.
        loss_mask: [b, s] of weights; None for all ones.
        group: tensor-parallel group; None for one device.
        block: tokens whose logits exist at a time.
        backend: path of the operators, see `ops/dispatch.py`.

    Raises:
        DataError: a counted label is outside the padded vocabulary (on a CPU).
    """
    size = 1 if group is None else dist.get_world_size(group)
    narrow = autocast_dtype(x.device)
    if narrow is not None and x.dtype != torch.float64:
        x, matrix = x.to(narrow), matrix.to(narrow)
    flat = labels.reshape(-1)
    weights = token_weights(labels, loss_mask, x.dtype)
    check_labels(flat, weights, matrix.shape[0] * size)
    mean = weights / weights.sum().clamp_min(1e-9)
    return _LinearCrossEntropy.apply(x.reshape(-1, x.shape[-1]), matrix, flat, mean, group, block, backend)
