"""BaseConv's own facts: the released sizes and formula, options. What every mixer answers is in test_contract.py."""

from __future__ import annotations

import pytest
import torch

from megatron.layers.base import Context
from megatron.layers.base_conv import BaseConv


def make(d: int, **options: object) -> BaseConv:
    return BaseConv(BaseConv.Config(hidden_size=d, num_heads=1, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(("d", "count"), [(1024, 6_302_720), (1792, 19_287_296)])
def test_parameter_count_and_state_of_the_released_models(d: int, count: int) -> None:
    """Counts of spec 1.2; our history is one input shorter than the originals' window of three."""
    with torch.device("meta"):
        layer = make(d)
    assert layer.param_count() == count
    assert dict(layer.state_size()) == {"conv": 2 * 2 * d}


def test_formula_tap_by_tap() -> None:
    layer = make(4).double()
    x = torch.randn(1, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y, _ = layer(x, Context())
    a, b, w = layer.conv_proj(x), layer.gate_proj(x), layer.conv1d.weight[:, 0]
    for t in range(6):
        c = sum(w[:, j] * a[0, t - 2 + j] for j in range(3) if t - 2 + j >= 0)
        assert (layer.out_proj(torch.nn.functional.silu(c) * b[0, t]) - y[0, t]).abs().max() < 1e-12


def test_options() -> None:
    layer = make(8, conv_width=5, expand=3, bias=False)
    assert {name for name, _ in layer.named_parameters() if "bias" in name} == set()
    assert layer.conv1d.weight.shape == (24, 1, 5)
    x = torch.randn(2, 9, 8)
    assert layer(x, Context())[0].shape == x.shape
