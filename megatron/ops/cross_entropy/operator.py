"""The two halves of a cross entropy over rows of temporary logits: statistics of a row, then its gradient.

Between the halves the statistics of a sharded vocabulary can be reduced over ranks (`model/linear_loss.py`). The gradient
overwrites the logits. Everything is computed in fp32 (fp64 for fp64 logits), the gradient is rounded to the logits' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.ops.dispatch import choose, path
from megatron.ops.opaque import visited
from megatron.ops.precision import in_accumulation_dtype

_CPU_ROWS = 128  # rows at a time whose fp32 copies stay in a CPU's cache


def _blocks(logits: Tensor) -> Sequence[slice]:
    """Row ranges: some at a time on a CPU, all at once on a GPU."""
    size = _CPU_ROWS if logits.device.type == "cpu" else max(1, logits.shape[0])
    return visited([slice(at, at + size) for at in range(0, logits.shape[0], size)], logits)


@path("cross_entropy", "reference")
@path("cross_entropy", "torch")
def row_stats_torch(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The plain form of `row_stats`."""
    peak = in_accumulation_dtype(logits.amax(-1))
    total = torch.empty_like(peak)
    for at in _blocks(logits):
        total[at] = (in_accumulation_dtype(logits[at]) - peak[at, None]).exp_().sum(-1)
    is_local = labels >= 0
    picked = in_accumulation_dtype(logits.gather(1, labels.clamp_min(0).unsqueeze(1)).squeeze(1))
    return peak, total, picked.masked_fill(~is_local, 0.0)


@path("cross_entropy.gradient", "reference")
@path("cross_entropy.gradient", "torch")
def row_gradient_torch(logits: Tensor, labels: Tensor, peak: Tensor, total: Tensor, weights: Tensor) -> None:
    """The plain form of `row_gradient_`."""
    scale = torch.where(weights == 0, 0.0, weights / total)
    local_weights = torch.where(labels >= 0, weights, 0.0)
    for at in _blocks(logits):
        share = (in_accumulation_dtype(logits[at]) - peak[at, None]).exp_().mul_(scale[at, None])
        share.scatter_add_(1, labels[at, None].clamp_min(0), -local_weights[at, None])
        logits[at] = share


def row_stats(logits: Tensor, labels: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of `logits [t, n]`: its maximum, its sum of exp(logit - maximum), and its label's logit.

    labels: [t], the column of each row's label, or negative if the column is on another rank (then the label's logit is 0).
    """
    return choose("cross_entropy", backend, logits.device)(logits, labels)


def row_gradient_(logits: Tensor, labels: Tensor, peak: Tensor, total: Tensor, weights: Tensor, backend: str = "auto") -> None:
    """Overwrite `logits [t, n]` by weights * (softmax - onehot): the gradient of sum(weights * cross entropy).

    peak, total: [t], of the whole vocabulary. labels as in `row_stats`; weights [t].
    """
    choose("cross_entropy.gradient", backend, logits.device)(logits, labels, peak, total, weights)
