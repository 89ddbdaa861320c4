"""Prefix linear attention: quadratic = chunked with gradients for any prefix, document and padding; all see the prefix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.ops.taylor import taylor, taylor_step
from megatron.ops.taylor.prefix import prefix_taylor

TOLERANCE = 1e-10  # fp64; quotients of sums of a few hundred terms of size O(10)


def draw(b: int, s: int, m: int, h: int = 2, f: int = 4, v: int = 6) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(b, s, h, f), (b, s, h, f), (b, s, h, v), (b, m, h, f), (b, m, h, v)]
    return [torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_() for shape in shapes]


def run(leaves: list[Tensor], backend: str, inside: Tensor, **extra: Any) -> list[Tensor]:
    y, final = prefix_taylor(*leaves, inside, backend=backend, **extra)
    g = torch.Generator().manual_seed(9)
    total = sum((t * torch.randn(t.shape, generator=g, dtype=torch.float64)).sum() for t in (y, final))
    return [y, final, *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize(("s", "m"), [(1, 1), (20, 0), (20, 7), (20, 20), (140, 1), (140, 129), (300, 200)])
@pytest.mark.parametrize("kind", ["plain", "documents", "padding", "documents padding", "state"])
def test_chunked_equals_quadratic(s: int, m: int, kind: str) -> None:
    leaves, g = draw(3, s, m), torch.Generator().manual_seed(4)
    extra: dict[str, Any] = {}
    inside = torch.ones(3, m, dtype=torch.float64)
    if "documents" in kind:
        extra["segment_ids"] = (torch.rand(3, s, generator=g) < 0.08).cumsum(1)
    if "padding" in kind:
        extra["keep"] = (torch.rand(3, s, generator=g) < 0.8).double()
        inside = inside * extra["keep"][:, :m]
    if kind == "state":
        k, v = (torch.randn(3, 5, 2, n, generator=g, dtype=torch.float64) for n in (4, 6))
        extra["state"] = taylor(k, k, v)[1]
    for a, b in zip(run(leaves, "reference", inside, **extra), run(leaves, "torch", inside, **extra), strict=True):
        assert (a - b).abs().max() <= TOLERANCE * max(1.0, float(a.detach().abs().max())) if a.numel() else a.shape == b.shape


def test_against_the_formula_pair_by_pair() -> None:
    q, k, v, k2, v2 = (t.detach() for t in draw(1, 12, 5, h=1))
    y, _ = prefix_taylor(q, k, v, k2, v2, torch.ones(1, 5, dtype=torch.float64))

    def p(a: Tensor, b: Tensor) -> Tensor:
        s = (a * b).sum() / 2  # sqrt(f) = 2
        return 1 + s + s * s / 2

    for i in range(12):
        pairs = [(p(q[0, i, 0], k[0, j, 0]), v[0, j, 0]) for j in range(i + 1)]
        pairs += [(p(q[0, i, 0], k2[0, j, 0]), v2[0, j, 0]) for j in range(5)]
        want = sum(w * value for w, value in pairs) / sum(w for w, _ in pairs)
        assert (y[0, i, 0] - want).abs().max() < 1e-12


def test_steps_after_the_prefill_equal_the_pass() -> None:
    q, k, v, k2, v2 = (t.detach() for t in draw(2, 30, 12))
    inside = torch.ones(2, 12, dtype=torch.float64)
    whole, final = prefix_taylor(q, k, v, k2, v2, inside)
    for start in (12, 25):
        _, state = prefix_taylor(q[:, :start], k[:, :start], v[:, :start], k2, v2, inside)
        for t in range(start, 30):
            y, state = taylor_step(q[:, t], k[:, t], v[:, t], state)
            assert (y - whole[:, t]).abs().max() <= TOLERANCE
        assert (state - final).abs().max() <= TOLERANCE
