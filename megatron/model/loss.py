"""Next-token loss on one device; the vocabulary-parallel form is `parallel/loss.py`.

Written out instead of `F.cross_entropy`, which holds three tensors of the size of the logits: this one holds none in the
forward pass and only the gradient in the backward, and works on a block of rows at a time so that a CPU stays in its cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops.precision import outside_autocast

_CPU_ROWS = 256


def _rows(logits: Tensor) -> int:
    """Rows per block: a few hundred on a CPU, everything at once on a GPU."""
    return _CPU_ROWS if logits.device.type == "cpu" else max(1, logits.shape[0])


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@outside_autocast
class _WeightedCrossEntropy(torch.autograd.Function):
    """sum(w * -log softmax(x)[label]) over rows: logits [t, n], labels [t] (in range), weights [t] in fp32 or fp64.

    The maximum and the sum of exponentials are kept apart: their logarithm together would round away digits of large logits.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        size = _rows(logits)
        peak = _wide(logits.amax(-1, keepdim=True))
        parts = zip(logits.split(size), peak.split(size), strict=True)
        total = torch.cat([(_wide(block) - top).exp_().sum(-1, keepdim=True) for block, top in parts])
        picked = _wide(logits.gather(1, labels.unsqueeze(1)))
        ctx.save_for_backward(logits, labels, weights, peak, total)
        return ((total.log() + (peak - picked)).squeeze(1) * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        logits, labels, weights, peak, total = ctx.saved_tensors
        scale = (weights * upstream).unsqueeze(1)
        gradient = torch.empty_like(logits)
        size = _rows(logits)
        for start in range(0, logits.shape[0], size):
            at = slice(start, start + size)
            share = (_wide(logits[at]) - peak[at]).exp_().mul_(scale[at] / total[at])
            share.scatter_add_(1, labels[at].unsqueeze(1), -scale[at])
            gradient[at] = share
        return gradient, None, None


def _traced_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The same sum for the compiler, which makes blocks by itself."""
    x = _wide(logits)
    peak = x.amax(-1, keepdim=True).detach()
    total = (x - peak).exp().sum(-1, keepdim=True)
    picked = x.gather(1, labels.unsqueeze(1))
    return ((total.log() + (peak - picked)).squeeze(1) * weights).sum()


def token_loss(logits: Tensor, labels: Tensor, loss_mask: Tensor | None = None) -> Tensor:
    """Mean cross entropy over the tokens that count, in fp32 (fp64 for fp64 logits).

    logits [b, s, n], labels [b, s] (-100 = ignored), loss_mask [b, s] of weights or None for all ones. The mean is over the
    weights; where none counts the loss is 0.
    """
    flat = labels.reshape(-1)
    counts = flat != -100
    weights = counts.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if loss_mask is not None:
        weights = weights * loss_mask.reshape(-1).to(weights.dtype)
    entropy = _traced_cross_entropy if torch.compiler.is_compiling() else _WeightedCrossEntropy.apply
    total = entropy(logits.reshape(-1, logits.shape[-1]), flat.masked_fill(~counts, 0), weights)
    return total / weights.sum().clamp_min(1e-9)
