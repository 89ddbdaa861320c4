"""Fused output projection and cross entropy, one block of tokens at a time: the logits of a full batch never exist.

With a vocabulary of 50,000 the logits of a micro batch and their gradient are by far the largest tensors of a step. Here each
block of tokens is projected, its loss and the gradient of its logits are computed at once, and both matrix products of the
backward follow while the block exists: the same number of operations as without fusion, the memory of one block, and one fp32
accumulator for the matrix's gradient. It works with a vocabulary sharded over ranks, like `model/parallel_loss.py`, with the
same two all-reduces per block.

The forward computes the gradients for an upstream gradient of 1 and with weights scaled to at most 1; the backward scales them.
So an fp16 loss scale acts on them where it would act without fusion.
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
from megatron.ops.opaque import visited
from megatron.ops.precision import autocast_dtype, outside_autocast, sum_dtype
from megatron.parallel.collectives import all_reduce


def _global_stats(stats: tuple[Tensor, Tensor, Tensor], group: ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum, sum of exponentials and the label's logit over the full vocabulary, from those of this rank's columns."""
    local_peak, total, picked = stats
    if group is None:
        return stats
    peak = all_reduce(local_peak, group, dist.ReduceOp.MAX)
    total, picked = all_reduce(torch.stack((total * (local_peak - peak).exp(), picked)), group)
    return peak, total, picked


def _accumulate(sum_: Tensor, left: Tensor, right: Tensor) -> None:
    """sum_ [n, d] += left^T right, accumulated in sum_'s dtype."""
    if left.dtype == sum_.dtype:
        sum_.addmm_(left.t(), right)
    elif left.device.type == "cuda":
        sum_.add_(torch.mm(left.t(), right, out_dtype=sum_.dtype))
    else:
        sum_.add_(left.t() @ right)


@outside_autocast
class _LinearCrossEntropy(torch.autograd.Function):
    """sum(weights * ce(x @ matrix^T)): x [t, d], matrix [n, d], labels [t] (global; any where weights are 0), weights [t]."""

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
        needs_gradient = any(ctx.needs_input_grad[:2])
        dx = torch.empty_like(x) if needs_gradient else None
        dmatrix = (
            torch.zeros(matrix.shape, dtype=sum_dtype(matrix.dtype), device=matrix.device) if ctx.needs_input_grad[1] else None
        )
        loss = weights.new_zeros(())
        for start in visited(range(0, x.shape[0], block), x):
            at = slice(start, start + block)
            logits = x[at] @ matrix.t()
            peak, total, picked = _global_stats(row_stats(logits, local[at], backend), group)
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
        matrix_gradient = None
        if dmatrix is not None:  # scaled and rounded in one step: no second fp32 copy
            matrix_gradient = torch.mul(dmatrix, factor, out=torch.empty(dmatrix.shape, dtype=ctx.dtype, device=dmatrix.device))
        return torch.mul(dx, factor, out=torch.empty_like(dx)), matrix_gradient, None, None, None, None, None


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
    """Mean cross entropy over the counted tokens for the logits `x @ matrix^T`, as `token_loss` of that product.

    Under autocast the product is computed in autocast's dtype, like every matrix product there.

    Args:
        x: [b, s, d] hidden states.
        matrix: [n / tp, d] this rank's rows of the output projection.
        labels: [b, s] global ids, -100 is ignored.
        loss_mask: [b, s] weights; None is all ones.
        group: tensor-parallel group; None for one device.
        block: tokens per block.
        backend: kernel backend.

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
