"""The fused path of `add_norm`; see `norm_launch.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops.dispatch import path
from megatron.ops.norm_launch import norm_forward


@path("add_norm", "triton")
def add_norm_fused(
    x: Tensor, added: Tensor, weight: Tensor | None, bias: Tensor | None, centred: bool, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Arguments and results as `add_norm` in `ops/norm.py`."""
    y, total = norm_forward(x, added, weight, bias, centred, eps, dtype)
    return total, y
