"""The fused path of the cross entropy over rows: statistics of a row, then its gradient.

No custom operators: it runs inside the autograd function of `model/linear_loss.py`, which is outside compiled regions.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from megatron.ops.cross_entropy import triton_kernels as kernels
from megatron.ops.cross_entropy.operator import row_gradient_torch, row_stats_torch
from megatron.ops.dispatch import path
from megatron.ops.kernel_arguments import device_guard
from megatron.ops.tuning import CROSS_ENTROPY


@path("cross_entropy", "triton")
def row_stats_fused(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as `row_stats` in `ops/cross_entropy/`; logits with dense columns. fp64 takes the plain path."""
    if logits.dtype == torch.float64:
        return row_stats_torch(logits, labels)
    t, n = logits.shape
    peak, total, picked = (torch.empty(t, dtype=torch.float32, device=logits.device) for _ in range(3))
    columns, warps = CROSS_ENTROPY
    block = max(int(kernels.GROUP.value), min(columns, triton.next_power_of_2(n)))
    if t:
        with device_guard(logits):
            kernels.row_stats[(t,)](
                logits, labels.contiguous(), peak, total, picked, n, logits.stride(0), BN=block, num_warps=warps
            )  # fmt: skip
    return peak, total, picked


@path("cross_entropy.gradient", "triton")
def row_gradient_fused(logits: Tensor, labels: Tensor, peak: Tensor, total: Tensor, weights: Tensor) -> None:
    """Arguments as `row_gradient_` in `ops/cross_entropy/`; fp64 takes the plain path."""
    if logits.dtype == torch.float64:
        row_gradient_torch(logits, labels, peak, total, weights)
        return
    t, n = logits.shape
    columns, warps = CROSS_ENTROPY
    block = min(columns, triton.next_power_of_2(n))
    labels, peak, total, weights = (x.contiguous() for x in (labels, peak, total, weights))
    if t:
        with device_guard(logits):
            kernels.row_gradient[(t, triton.cdiv(n, block))](
                logits, labels, peak, total, weights, n, logits.stride(0), BN=block, num_warps=warps
            )  # fmt: skip
