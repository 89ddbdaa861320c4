"""Norms of the residual stream, and the addition before them, in fp32 (fp64 for fp64): plain forms and dispatch.

    s = x + added            y = (s - mean?) / sqrt(mean square + eps) [* weight] [+ bias]

LayerNorm subtracts the mean, RMSNorm does not. The sum has the dtype of the stream, y the requested one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.ops.dispatch import choose, path
from megatron.ops.precision import in_accumulation_dtype


@path("norm", "reference")
@path("norm", "torch")
def norm_torch(x: Tensor, weight: Tensor | None, bias: Tensor | None, centred: bool, eps: float, dtype: torch.dtype) -> Tensor:
    """The formula with torch's own norms; x is cast to fp32, y to `dtype`."""
    wide = in_accumulation_dtype(x)
    gain = None if weight is None else weight.to(wide.dtype)
    if centred:
        shift = None if bias is None else bias.to(wide.dtype)
        return F.layer_norm(wide, x.shape[-1:], gain, shift, eps).to(dtype)
    return F.rms_norm(wide, x.shape[-1:], gain, eps).to(dtype)


@path("norm.add", "reference")
@path("norm.add", "torch")
def add_norm_torch(
    x: Tensor, added: Tensor, weight: Tensor | None, bias: Tensor | None, centred: bool, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The sum, then `norm_torch` of it."""
    total = x + added
    return total, norm_torch(total, weight, bias, centred, eps, dtype)


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    centred: bool,
    eps: float,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """y of x [..., d] with weight and bias [d] or None, in `dtype` (x's by default); `centred` makes it LayerNorm."""
    return choose("norm", backend, x.device)(x, weight, bias, centred, eps, dtype or x.dtype)


def add_norm(
    x: Tensor,
    added: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    centred: bool,
    eps: float,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(s, y): s = x + added in x's dtype, which must be as wide as added's, and its norm in `dtype` (x's by default)."""
    return choose("norm.add", backend, x.device)(x, added, weight, bias, centred, eps, dtype or x.dtype)
