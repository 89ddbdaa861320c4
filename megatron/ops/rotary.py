"""Rotary position embedding (arXiv 2104.09864), in the form that pairs dimension i with i + n ("rotate half").

    width r requested, n = ceil(r / 2) frequencies  f_i = base^(-2 i / r),  2 n dimensions are rotated, the rest is left alone
    (x_i, x_{i+n}) at position p  ->  (x_i cos p f_i - x_{i+n} sin p f_i,  x_{i+n} cos p f_i + x_i sin p f_i)

An odd r rotates r + 1 dimensions with r's frequencies, as flash-attn's tables do; the released attn-1b (head width 70, half of
it rotated) was trained that way. Angles, sines and the rotation are fp32 (fp64 for an fp64 model), whatever the model's dtype.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from megatron.ops.precision import sum_dtype


def rotary_width(head_dim: int, fraction: float) -> int:
    """Number of dimensions to rotate: `head_dim * fraction`, rounded down.

    Raises:
        ValueError: the fraction rotates nothing, or an odd width needs one dimension more than there are.
    """
    width = int(head_dim * fraction)
    if not 0 < width + width % 2 <= head_dim:
        raise ValueError(f"a rotary share of {fraction} of head width {head_dim} rotates {width} dimensions")
    return width


def rotary_angles(positions: Tensor, width: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [..., ceil(width / 2)] of integer `positions [...]`; fp64 for an fp64 `dtype`, fp32 else."""
    wide = sum_dtype(dtype)
    steps = torch.arange(0, width, 2, dtype=wide, device=positions.device)
    angles = positions.to(wide)[..., None] * (1.0 / base ** (steps / width))
    return angles.cos(), angles.sin()


@functools.lru_cache(maxsize=8)
def _table(length: int, width: int, base: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # a table made under inference mode could not be used in training afterwards
        return rotary_angles(torch.arange(length, device=device), width, base, dtype)


def rotary_table(length: int, width: int, base: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [length, ceil(width / 2)] of positions 0, 1, ...; the last few tables are cached for all layers."""
    if torch.compiler.is_compiling():  # a table is part of the graph, where the compiler shares it
        return rotary_angles(torch.arange(length, device=device), width, base, dtype)
    cos, sin = _table(64 * -(-length // 64), width, base, dtype, device)
    return cos[:length], sin[:length]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x [b, s, h, k]` rotated; cos and sin [s, n] or [b, s, n]. Result in x's dtype."""
    n = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    a, b, *rest = x.split([n, n, x.shape[-1] - 2 * n] if x.shape[-1] > 2 * n else n, dim=-1)
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), *rest], dim=-1)
