"""The sliding window's own facts: how many keys, constant state, long rows in blocks, options. The rest is the contract."""

from __future__ import annotations

import pytest
import torch

from megatron.layers.base import Context
from megatron.layers.sliding import SlidingAttention

D, H = 32, 2


def make(window: int = 5, **options: object) -> SlidingAttention:
    layer = SlidingAttention(SlidingAttention.Config(hidden_size=D, num_heads=H, window=window, **options)).double()  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.3)
    return layer


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("window", [1, 5, 100])
def test_a_token_sees_itself_and_window_before_it(window: int, backend: str) -> None:
    x = torch.randn(1, 300, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    y, _ = make(window)(x, Context(backend=backend))
    (grad,) = torch.autograd.grad(y[:, 250].sum(), x)
    seen = grad.abs().amax((0, 2)).nonzero().flatten().tolist()
    assert seen == list(range(250 - window, 251))


@pytest.mark.parametrize("window", [3, 64, 90])
@pytest.mark.parametrize("cuts", [[300], [170, 300], [3, 68, 200, 300]])
def test_pieces_and_steps_equal_the_whole(window: int, cuts: list[int]) -> None:
    x = torch.randn(2, 310, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    layer = make(window)
    whole, _ = layer(x, Context())
    reference, _ = layer(x, Context(backend="reference"))
    assert (whole - reference).abs().max() < 1e-12
    state, parts, start = layer.init_state(2, x.dtype, "cpu"), [], 0
    for end in cuts:
        y, state = layer(x[:, start:end], Context(), state)
        parts.append(y)
        start = end
    for t in range(start, 310):
        y, state = layer.step(x[:, t], state, Context())
        parts.append(y[:, None])
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-12
    assert {n: tuple(t.shape[1:]) for n, t in state.items()} == {
        "keys": (window, H, D // H),
        "values": (window, H, D // H),
        "places": (window,),
        "seen": (),
    }


def test_costs_do_not_grow_with_the_text() -> None:
    layer = make(128)
    assert layer.flops(100_000) == pytest.approx(8 * D * D + 4 * D * 129, rel=1e-2)
    assert layer.state_size()["keys"] == 128 * D and layer.param_count() == 4 * D * D


def test_options() -> None:
    x = torch.randn(1, 40, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    turned, plain = make(50)(x, Context())[0], make(50, rotary_fraction=0.0)(x, Context())[0]
    assert (turned - plain).abs().max() > 1e-3
    with pytest.raises(ValueError, match="window 0"):
        make(0)
