"""MetaLA's own facts: sizes, options and refusals. The maths is held by tests/ops/test_metala.py and by the golden models."""

from __future__ import annotations

import pytest
import torch

from megatron.layers.base import Context
from megatron.layers.metala import MetaLA


def make(d: int = 64, h: int = 2, **options: object) -> MetaLA:
    return MetaLA(MetaLA.Config(hidden_size=d, num_heads=h, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(("d", "h"), [(64, 2), (128, 4), (2048, 16)])
def test_parameter_count_and_state(d: int, h: int) -> None:
    """4 d^2 + 5.5 d parameters; h dk dv = d^2 / 2h state elements and three past inputs (spec A2)."""
    with torch.device("meta"):
        layer = make(d, h)
    assert layer.param_count() == 4 * d * d + 11 * d // 2
    assert dict(layer.state_size()) == {"recurrent": d * d // (2 * h), "conv": 3 * d}


def test_refusals() -> None:
    with pytest.raises(ValueError, match="divisible by 2"):
        make(66, 2)
    with pytest.raises(ValueError, match="gate_round"):
        make(gate_round="int8")


def test_gate_round_changes_a_half_precision_pass_only_where_asked() -> None:
    x = torch.randn(1, 30, 64, generator=torch.Generator().manual_seed(0))
    layer, rounded = make(), make(gate_round="bf16")
    with torch.no_grad():
        layer.k_gate.weight.mul_(30)
    rounded.load_state_dict(layer.state_dict())
    plain, _ = layer(x, Context())
    other, _ = rounded(x, Context())
    assert 1e-5 < (plain - other).abs().max() < 1.0
    reference, _ = rounded(x, Context(backend="reference"))
    assert (reference - other).abs().max() < 1e-4


@pytest.mark.parametrize("width", [2, 3])
def test_conv_width(width: int) -> None:
    layer = make(conv_width=width)
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0))
    whole, _ = layer(x, Context())
    state = layer.init_state(1, x.dtype, "cpu")
    steps = []
    for t in range(9):
        y, state = layer.step(x[:, t], state, Context())
        steps.append(y)
    assert (torch.stack(steps, 1) - whole).abs().max() < 1e-5  # fp32
