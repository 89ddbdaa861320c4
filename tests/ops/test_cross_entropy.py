"""Statistics of rows of logits on both paths against fp64: few and many columns, columns that are masked out, NaN.

fp32: 2e-6 of each number.
"""

from __future__ import annotations

import pytest
import torch

from megatron.ops.cross_entropy import row_stats
from tests.ops.fused_cases import device_matrix

pytest.importorskip("triton", reason="the fused kernels need Triton: pip install triton")


@device_matrix
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("n", [1, 3, 8, 50, 2048, 2049, 5000])
def test_statistics(device: str, backend: str, n: int) -> None:
    """Large logits, a group and a whole tile of columns at minus infinity, a label that another rank holds."""
    gen = torch.Generator().manual_seed(n)
    logits = 30 * torch.randn(4, n, generator=gen)
    logits[1, : n // 2] = float("-inf")
    labels = torch.tensor([n - 1, n - 1, -1, 0])
    peak, total, picked = (x.double().cpu() for x in row_stats(logits.to(device), labels.to(device), backend))
    exact = logits.double()
    assert torch.equal(peak, exact.amax(1))
    assert torch.allclose(total, (exact - exact.amax(1, keepdim=True)).exp().sum(1), rtol=2e-6, atol=0)
    expected = exact.gather(1, labels.clamp_min(0)[:, None])[:, 0] * (labels >= 0)
    assert torch.equal(picked, expected)


@device_matrix
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_logit_that_is_no_number_stays_seen(device: str, backend: str) -> None:
    logits = torch.randn(2, 20, device=device)
    logits[0, 13] = float("nan")
    _, total, _ = row_stats(logits, torch.tensor([0, 0], device=device), backend)
    assert torch.isnan(total[0]) and torch.isfinite(total[1])
