"""Cross entropy of logits: on one device, or of one tensor-parallel rank's columns of them (`model/parallel_loss.py`).

`F.cross_entropy` allocates three tensors of the size of the logits. This implementation allocates none in the forward pass and
only the gradient in the backward, and processes one block of rows at a time so that a CPU stays in its cache.

Each token has a weight. Label -100 means weight 0, and the label of a token of weight 0 is not read. The same applies to
`model/linear_loss.py`, which computes its logits itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops.opaque import visited
from megatron.ops.precision import in_accumulation_dtype, outside_autocast, sum_dtype

_CPU_ROWS = 256
Reduce = Callable[[Tensor, str], Tensor]
"""Reduction of a tensor over the ranks that share the vocabulary: (tensor, `max` or `sum`) -> a new tensor."""


def _rows(logits: Tensor) -> int:
    """Rows per block: a few hundred on a CPU, everything at once on a GPU."""
    return _CPU_ROWS if logits.device.type == "cpu" else max(1, logits.shape[0])


@outside_autocast
class _WeightedCrossEntropy(torch.autograd.Function):
    """sum(w * -log softmax(x)[label]) over rows.

    Inputs: logits [t, n]; labels [t], columns of `logits`, negative for labels of other ranks' columns; weights [t] in fp32 or
    fp64; `reduce` over the ranks with the other columns, None on one device. The backward needs no reduction.

    The maximum and the sum of exponentials are stored separately: one logarithm of both would round away digits of large
    logits.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, weights: Tensor, reduce: Reduce | None) -> Tensor:
        size = _rows(logits)
        peak = in_accumulation_dtype(logits.amax(-1, keepdim=True))
        if reduce is not None:
            peak = reduce(peak, "max")
        total = torch.empty_like(peak)
        for start in visited(range(0, logits.shape[0], size), logits):
            at = slice(start, start + size)
            total[at] = (in_accumulation_dtype(logits[at]) - peak[at]).exp_().sum(-1, keepdim=True)
        picked = in_accumulation_dtype(logits.gather(1, labels.clamp_min(0).unsqueeze(1)))
        if reduce is not None:
            total, picked = reduce(torch.stack((total, picked.masked_fill(labels.unsqueeze(1) < 0, 0.0))), "sum")
        ctx.save_for_backward(logits, labels, weights, peak, total)
        return ((total.log() + (peak - picked)).squeeze(1) * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        logits, labels, weights, peak, total = ctx.saved_tensors
        scale = (weights * upstream).unsqueeze(1)
        gradient = torch.empty_like(logits)
        size = _rows(logits)
        for start in visited(range(0, logits.shape[0], size), logits):
            at = slice(start, start + size)
            share = (in_accumulation_dtype(logits[at]) - peak[at]).exp_().mul_(scale[at] / total[at])
            label = labels[at].unsqueeze(1)
            share.scatter_add_(1, label.clamp_min(0), torch.where(label < 0, 0.0, -scale[at]))
            gradient[at] = share
        return gradient, None, None, None


def _traced_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The same sum for the compiler, which splits it into blocks itself."""
    x = in_accumulation_dtype(logits)
    peak = x.amax(-1, keepdim=True).detach()
    total = (x - peak).exp().sum(-1, keepdim=True)
    picked = x.gather(1, labels.unsqueeze(1))
    return ((total.log() + (peak - picked)).squeeze(1) * weights).sum()


def token_weights(labels: Tensor, loss_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Weight of each token [t] in fp32, in fp64 for logits of that `dtype`: its mask, 0 where the label is -100.

    Args:
        labels: [b, s].
        loss_mask: [b, s] of weights; None for all ones.
        dtype: of the logits.
    """
    weights = (labels != -100).reshape(-1).to(sum_dtype(dtype))
    return weights if loss_mask is None else weights * loss_mask.reshape(-1).to(weights.dtype)


def token_loss(
    logits: Tensor, labels: Tensor, loss_mask: Tensor | None = None, first_column: int = 0, reduce: Reduce | None = None
) -> Tensor:
    """Weighted mean cross entropy over tokens, in fp32 (fp64 for fp64 logits); 0 if all weights are 0.

    Args:
        logits: [b, s, n], or this rank's n columns of them.
        labels: [b, s] ids of the whole vocabulary, -100 = ignored.
        loss_mask: [b, s] of weights; None for all ones.
        first_column: id of this rank's first column.
        reduce: over the ranks of the other columns; None on one device.
    """
    weights = token_weights(labels, loss_mask, logits.dtype)
    local = labels.reshape(-1).masked_fill(weights == 0, first_column) - first_column
    flat = logits.reshape(-1, logits.shape[-1])
    if reduce is None and torch.compiler.is_compiling():
        total = _traced_cross_entropy(flat, local, weights)
    else:
        if reduce is not None:
            local = torch.where((local >= 0) & (local < flat.shape[-1]), local, -1)
        total = _WeightedCrossEntropy.apply(flat, local, weights, reduce)
    return total / weights.sum().clamp_min(1e-9)
