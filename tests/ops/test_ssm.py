"""The selective scan: chunked path against the token-by-token one with gradients, steps, document boundaries, padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.ops.selective_scan import selective_scan, selective_step


def draw(b: int, s: int, d: int = 6, n: int = 4) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    leaves = [normal(b, s, d), normal(b, s, d).abs(), -normal(d, n).exp(), normal(b, s, n), normal(b, s, n), normal(b, d, n)]
    return [t.requires_grad_() for t in leaves]


def run(leaves: list[Tensor], backend: str, with_state: bool, ids: Tensor | None) -> list[Tensor]:
    y, final = selective_scan(*leaves[:5], state=leaves[5] if with_state else None, segment_ids=ids, backend=backend)
    g = torch.Generator().manual_seed(9)
    total = sum((t * torch.randn(t.shape, generator=g, dtype=torch.float64)).sum() for t in (y, final))
    return [y, final, *torch.autograd.grad(total, leaves if with_state else leaves[:5])]


@pytest.mark.parametrize("s", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_chunked_equals_reference(s: int, documents: bool, with_state: bool) -> None:
    leaves = draw(3, s)
    ids = (torch.rand(3, s, generator=torch.Generator().manual_seed(4)) < 0.1).cumsum(1) if documents else None
    for a, b in zip(run(leaves, "reference", with_state, ids), run(leaves, "torch", with_state, ids), strict=True):
        assert (a - b).abs().max() <= 1e-10 * max(1.0, float(a.detach().abs().max()))  # fp64, sums of up to 100 terms


def test_steps_equal_the_pass() -> None:
    u, dt, a, b, c, state = (t.detach() for t in draw(2, 40))
    whole, final = selective_scan(u, dt, a, b, c, state=state)
    for t in range(40):
        y, state = selective_step(u[:, t], dt[:, t], a, b[:, t], c[:, t], state)
        assert (y - whole[:, t]).abs().max() <= 1e-12
    assert (state - final).abs().max() <= 1e-12


def test_a_step_size_of_zero_leaves_the_state_alone() -> None:
    u, dt, a, b, c, state = (t.detach() for t in draw(1, 20))
    dt[:, 12:] = 0
    _, final = selective_scan(u, dt, a, b, c, state=state)
    _, end = selective_scan(u[:, :12], dt[:, :12], a, b[:, :12], c[:, :12], state=state)
    assert torch.equal(final, end)


def test_half_precision_inputs_keep_fp32_inside() -> None:
    """bf16 inputs: the scan of their values in fp32 differs from fp64 by fp32 rounding only."""
    leaves = [t.detach().bfloat16() for t in draw(2, 100)]
    y, final = selective_scan(*leaves[:5], state=leaves[5].float())
    want, want_final = selective_scan(*(t.double() for t in leaves[:5]), state=leaves[5].double(), backend="reference")
    assert y.dtype == final.dtype == torch.float32
    assert (y.double() - want).norm() / want.norm() < 1e-5
    assert (final.double() - want_final).norm() / want_final.norm() < 1e-5
