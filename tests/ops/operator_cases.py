"""Every operator as a function of its differentiable inputs, with states, documents and padding, for tests of whole families.

It gives leaves and a function of them. `narrow` is the format of what projections make; the rest is fp32, as under autocast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron.ops.conv import causal_conv
from megatron.ops.metala import metala_packed
from megatron.ops.selective_scan import selective_scan
from megatron.ops.taylor import taylor
from megatron.ops.taylor.prefix import prefix_taylor

Run = Callable[..., tuple[Tensor, ...]]
Case = tuple[list[Tensor], Run]


class Draw:
    """Random tensors of one seed."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(dtype)

    def extras(self, t: int, extras: str) -> dict[str, Tensor]:
        """Document numbers [2, t], and a mask [2, t] that hides the start of the second row."""
        ids = (torch.rand(2, t, generator=self.generator) < 0.1).cumsum(1)
        mask = torch.ones(2, t)
        mask[1, : t // 3] = 0
        return {"plain": {}, "documents": {"segment_ids": ids}, "padding": {"segment_ids": ids, "mask": mask}}[extras]


def _metala(t: int, narrow: torch.dtype, extras: str) -> Case:
    draw = Draw()
    more = draw.extras(t, extras)
    leaves = [draw(2, t, 48, dtype=narrow), draw(2, 4), draw(2, 2, 4, 8)]
    return leaves, lambda packed, w, state: metala_packed(packed, w, state=state, **more)


def _taylor(t: int, narrow: torch.dtype, extras: str) -> Case:
    draw = Draw()
    more = draw.extras(t, extras)
    rates = -torch.tensor([0.1, 0.01]) * torch.ones(1, t, 1)
    leaves = [*(draw(2, t, 2, w, dtype=narrow) for w in (4, 4, 6)), draw(2, 2, 15, 7).abs()]
    ids, keep = more.get("segment_ids"), more.get("mask")
    return leaves, lambda q, k, v, state: taylor(q, k, v, state=state, log_decay=rates, segment_ids=ids, keep=keep)


def _prefix(t: int, narrow: torch.dtype, extras: str) -> Case:
    draw = Draw()
    more, m = draw.extras(t, extras), min(t, 5)
    leaves = [draw(2, n, 2, w, dtype=narrow) for n, w in ((t, 4), (t, 4), (t, 6), (m, 4), (m, 6))] + [draw(2, 2, 15, 7).abs()]
    ids, keep, inside = more.get("segment_ids"), more.get("mask"), torch.ones(2, m)
    return leaves, lambda q, k, v, k2, v2, state: prefix_taylor(
        q, k, v, k2, v2, inside, state=state, segment_ids=ids, keep=keep
    )


def _ssm(t: int, narrow: torch.dtype, extras: str) -> Case:
    draw = Draw()
    ids = draw.extras(t, extras).get("segment_ids")
    u, dt, a = draw(2, t, 6, dtype=narrow), draw(2, t, 6).abs(), -draw(6, 3).exp()
    leaves = [u, dt, a, *(draw(2, t, 3, dtype=narrow) for _ in range(2)), draw(2, 6, 3)]
    return leaves, lambda u, dt, a, b, c, state: selective_scan(u, dt, a, b, c, state=state, segment_ids=ids)


def _conv(t: int, narrow: torch.dtype, extras: str) -> Case:
    draw = Draw()
    ids = draw.extras(t, extras).get("segment_ids")
    leaves = [draw(2, t, 6, dtype=narrow), draw(6, 1, 4), draw(2, 3, 6, dtype=narrow), draw(6)]
    bias = (lambda b: None) if extras == "plain" else (lambda b: b)
    return leaves, lambda x, w, history, b: (
        causal_conv(x, w, bias(b), history=history, segment_ids=ids) + 0 * b.sum().to(x.dtype),
    )


EXTRAS = ("plain", "documents", "padding")
CASES = {"metala": _metala, "taylor": _taylor, "prefix_taylor": _prefix, "selective_scan": _ssm, "conv": _conv}
