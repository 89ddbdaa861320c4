"""In which format sums, states and denominators are kept: fp32, or fp64 where the input is fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_sum_dtype(x: Tensor) -> Tensor:
    """`x` in the format of sums; itself where it is in it already."""
    return x.to(sum_dtype(x.dtype))
