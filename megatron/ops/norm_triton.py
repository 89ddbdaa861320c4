"""The fused path of `norm`; see `norm_launch.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops.dispatch import path
from megatron.ops.norm_launch import norm_forward


@path("norm", "triton")
def norm_fused(x: Tensor, weight: Tensor | None, bias: Tensor | None, centred: bool, eps: float, dtype: torch.dtype) -> Tensor:
    """Arguments and result as `norm` in `ops/norm.py`."""
    return norm_forward(x, None, weight, bias, centred, eps, dtype)[0]
