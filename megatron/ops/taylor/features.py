"""The Taylor feature map of Based in its packed symmetric form.

With y = x / f^(1/4), phi(x) = [1 | y | y_i^2 / sqrt(2) | y_i y_j for i < j], so that phi(q).phi(k) = 1 + s + s^2 / 2 with
s = q.k / sqrt(f): the second-order Taylor polynomial of exp(s) (Based, arXiv 2402.18668, section 3). The released code
multiplies all f^2 pairs out (1 + f + f^2 = 273 numbers at f = 16); y_i y_j = y_j y_i, so 1 + f + f(f+1)/2 = 153 say the same.

The pairs stand by their distance on a ring: first all (i, i), then (i, i+1), (i, i+2), ... with indices modulo f. Each distance
is then one product of two contiguous slices, without a gather; an even f ends with half a turn.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops.precision import outside_autocast


def feature_count(f: int) -> int:
    """Length of phi(x) for x of length `f`."""
    return 1 + f + f * (f + 1) // 2


def _distances(f: int) -> list[tuple[int, int, int]]:
    """(distance r, number of pairs, place of the first in phi) for r = 1, 2, ..."""
    full = [(r, f) for r in range(1, (f - 1) // 2 + 1)] + ([(f // 2, f // 2)] if f % 2 == 0 else [])
    return [(r, count, 1 + 2 * f + (r - 1) * f) for r, count in full]


def taylor_features(y: Tensor) -> Tensor:
    """phi of already scaled `y [..., f]` -> `[..., e]` with e = `feature_count(f)`; autograd does not see it."""
    f = y.shape[-1]
    phi = y.new_empty(*y.shape[:-1], feature_count(f))
    phi[..., 0] = 1.0
    phi[..., 1 : 1 + f] = y
    torch.mul(y, y * math.sqrt(0.5), out=phi[..., 1 + f : 1 + 2 * f])
    ring = torch.cat([y, y[..., : f // 2]], -1)
    for r, count, at in _distances(f):
        torch.mul(y[..., :count], ring[..., r : r + count], out=phi[..., at : at + count])
    return phi


def taylor_features_backward(y: Tensor, dphi: Tensor) -> Tensor:
    """Gradient of `y [..., f]` from that of its features `[..., e]`."""
    f = y.shape[-1]
    ring = torch.cat([y, y[..., : f // 2]], -1)
    dring = torch.zeros_like(ring)
    dring[..., :f] = dphi[..., 1 : 1 + f]
    dring[..., :f].addcmul_(y, dphi[..., 1 + f : 1 + 2 * f], value=math.sqrt(2.0))
    for r, count, at in _distances(f):
        part = dphi[..., at : at + count]
        dring[..., :count].addcmul_(part, ring[..., r : r + count])
        dring[..., r : r + count].addcmul_(part, y[..., :count])
    dy = dring[..., :f]
    dy[..., : f // 2] += dring[..., f:]
    return dy


@outside_autocast
class TaylorMap(torch.autograd.Function):
    """`taylor_features` for autograd: keeps y alone."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        """`y [..., f]` -> phi `[..., e]`."""
        ctx.save_for_backward(y)
        return taylor_features(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dphi: Tensor) -> Tensor:
        """See `taylor_features_backward`."""
        return taylor_features_backward(ctx.saved_tensors[0], dphi)


def features_by_definition(y: Tensor) -> Tensor:
    """`taylor_features` by gathers, which autograd and the compiler see through."""
    f = y.shape[-1]
    i = torch.arange(f, device=y.device)
    rings = [(i, (i + r) % f) for r in range((f - 1) // 2 + 1)]
    if f % 2 == 0:
        rings.append((i[: f // 2], i[f // 2 :]))
    pairs = [y[..., a] * y[..., b] * (0.5**0.5 if n == 0 else 1.0) for n, (a, b) in enumerate(rings)]
    return torch.cat([torch.ones_like(y[..., :1]), y, *pairs], -1)


def unpacked_features(phi: Tensor, f: int) -> Tensor:
    """`[..., e]` packed -> `[..., 1 + f + f^2]` in the released order (row-major pairs), to compare states."""
    square = phi.new_zeros(*phi.shape[:-1], f, f)
    place = torch.arange(f, device=phi.device)
    square[..., place, place] = phi[..., 1 + f : 1 + 2 * f]
    for r, count, at in _distances(f):
        i = place[:count]
        j = (i + r) % f
        half = phi[..., at : at + count] * math.sqrt(0.5)
        square[..., i, j] = half
        square[..., j, i] = half
    return torch.cat([phi[..., : 1 + f], square.flatten(-2)], -1)
