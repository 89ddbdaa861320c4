"""Rotary positions: relative, partial, odd widths, precision."""

from __future__ import annotations

import pytest
import torch

from megatron.ops.rotary import rotary_angles, rotary_table, rotary_width, rotate


def test_products_depend_on_the_distance_only() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 2, 16, generator=g, dtype=torch.float64) for _ in range(2))

    def product(i: int, j: int) -> torch.Tensor:
        a = rotate(q, *rotary_angles(torch.tensor([i]), 16, 1e4, torch.float64))
        b = rotate(k, *rotary_angles(torch.tensor([j]), 16, 1e4, torch.float64))
        return (a * b).sum(-1)

    assert torch.allclose(product(9, 4), product(1009, 1004), atol=1e-11)
    assert (product(9, 4) - product(9, 5)).abs().max() > 1e-3


@pytest.mark.parametrize(("width", "rotated"), [(8, 8), (7, 8), (35, 36)])
def test_an_odd_width_rotates_one_more(width: int, rotated: int) -> None:
    x = torch.randn(1, 3, 1, 70, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_table(3, width, 1e4, x.dtype, x.device)
    assert cos.shape == (3, rotated // 2)
    assert torch.allclose(cos[2, 1].double(), torch.tensor(2.0 * 1e4 ** (-2 / width)).double().cos(), atol=1e-6)
    y = rotate(x, cos, sin)
    assert torch.equal(y[..., rotated:], x[..., rotated:]) and torch.equal(y[:, 0], x[:, 0])
    assert (y[:, 1:, :, :rotated] != x[:, 1:, :, :rotated]).any()


def test_tables_are_wide_and_shared() -> None:
    """bf16 models get fp32 tables: at position 4,001 bf16 could not even hold the angle. A table outlives inference mode."""
    with torch.inference_mode():
        cos, _ = rotary_table(5000, 16, 1e4, torch.bfloat16, torch.device("cpu"))
    assert cos.dtype == torch.float32 and not cos.is_inference()
    exact = torch.arange(5000).double().cos()
    assert (cos[:, 0].double() - exact).abs().max() < 1e-6
    x = torch.ones(1, 5000, 1, 16, dtype=torch.bfloat16)
    assert rotate(x, cos, cos).dtype == torch.bfloat16


def test_refusals() -> None:
    assert rotary_width(64, 0.5) == 32 and rotary_width(14, 0.5) == 7
    for head_dim, fraction in ((64, 0.0), (7, 1.0), (8, 1.5)):
        with pytest.raises(ValueError, match="rotary share"):
            rotary_width(head_dim, fraction)
