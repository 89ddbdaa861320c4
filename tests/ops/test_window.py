"""Steps of windowed attention over a ring, on both paths, against attention over the whole text in fp64.

fp32: 2e-6 of the norm. bf16: 4e-3, one rounding of the result; keys and values are rounded before both.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.layers.base import Context
from megatron.layers.sliding import SlidingAttention
from megatron.layers.softmax import SoftmaxAttention
from megatron.ops.window import window_step_
from tests.ops.fused_cases import device_matrix, relative
from tests.ops.triton_bf16 import emulate_bf16

pytest.importorskip("triton", reason="the fused kernels need Triton: pip install triton")

BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])
# rows, query heads, heads of keys, head width, window, tokens
SHAPES = [
    (2, 2, 2, 16, 4, 11),
    (1, 1, 1, 64, 16, 20),
    (3, 4, 2, 20, 5, 9),
    (1, 6, 1, 8, 3, 8),
    (2, 1, 1, 128, 33, 5),
    (1, 2, 2, 24, 1, 4),
    (1, 1, 1, 16, 100, 105),
    (2, 3, 3, 40, 64, 3),
    (1, 1, 1, 256, 40, 42),
    (5, 2, 1, 16, 7, 8),
]


def ring(b: int, w: int, g: int, d: int, device: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """An empty one; what lies in it is never seen."""
    return {
        "keys": torch.full((b, w, g, d), 7.0, device=device, dtype=dtype),
        "values": torch.full((b, w, g, d), float("nan"), device=device, dtype=dtype).nan_to_num(1e4),
        "places": torch.full((b, w), -1, device=device),
        "seen": torch.zeros(b, dtype=torch.long, device=device),
    }


def exact(q: Tensor, k: Tensor, v: Tensor, w: int, scale: float) -> Tensor:
    """y [b, t, h, d] in fp64: each token over itself and the w tokens before it, one query at a time."""
    q, k, v = (x.double().cpu() for x in (q, k, v))
    share = q.shape[2] // k.shape[2]
    found = torch.zeros_like(q)
    for t in range(q.shape[1]):
        first = max(0, t - w)
        for h in range(q.shape[2]):
            scores = (k[:, first : t + 1, h // share] @ q[:, t, h].unsqueeze(-1)).squeeze(-1) * scale
            found[:, t, h] = (scores.softmax(-1).unsqueeze(-1) * v[:, first : t + 1, h // share]).sum(1)
    return found


def draw(shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    b, h, g, d, _, t = shape
    gen = torch.Generator().manual_seed(sum(shape))
    q, k, v = (torch.randn(b, t, n, d, generator=gen).to(device, dtype) for n in (h, g, g))
    return 2 * q, k, v


@device_matrix
@BACKENDS
@pytest.mark.parametrize("shape", SHAPES)
def test_every_step_of_a_text(device: str, backend: str, shape: tuple[int, ...]) -> None:
    """From an empty ring until it has been overwritten; addresses do not change and counters count."""
    b, _, g, d, w, t = shape
    q, k, v = draw(shape, device)
    state, scale = ring(b, w, g, d, device), d**-0.5
    addresses = {name: x.data_ptr() for name, x in state.items()}
    got = torch.stack([window_step_(q[:, i], k[:, i], v[:, i], **state, scale=scale, backend=backend) for i in range(t)], 1)
    assert relative(got, exact(q, k, v, w, scale)) < 2e-6
    assert {name: x.data_ptr() for name, x in state.items()} == addresses
    assert state["seen"].tolist() == [t] * b
    last = [-1] * max(0, w - t) + list(range(max(0, t - w), t))
    assert all(sorted(row) == last for row in state["places"].tolist())


@device_matrix
@BACKENDS
def test_rows_of_different_length_and_order(device: str, backend: str) -> None:
    """One row before its first token, one with gaps, one in the order that steps leave behind."""
    w, d, gen = 4, 16, torch.Generator().manual_seed(0)
    places = torch.tensor([[-1, -1, -1, -1], [3, -1, 9, -1], [12, 9, 10, 11]])
    seen = torch.tensor([0, 10, 13])
    text = torch.randn(2, 3, 14, 1, d, generator=gen)
    state = ring(3, w, 1, d, device)
    for row in range(3):
        for entry, place in enumerate(places[row].tolist()):
            if place >= 0:
                state["keys"][row, entry], state["values"][row, entry] = text[:, row, place].to(device)
    state |= {"places": places.to(device), "seen": seen.to(device)}
    q, (k, v) = torch.randn(3, 1, d, generator=gen), torch.stack([text[:, row, seen[row]] for row in range(3)], 1)
    got = window_step_(q.to(device), k.to(device), v.to(device), **state, scale=0.3, backend=backend)
    for row, visible in enumerate(([0], [9, 10], [9, 10, 11, 12, 13])):  # place 3 of the second row is out of sight
        keys, values = text[:, row, visible, 0].double()
        expected = (keys @ q[row, 0].double() * 0.3).softmax(0) @ values
        assert relative(got[row, 0], expected) < 2e-6
    assert state["places"].tolist() == [[0, -1, -1, -1], [3, 10, 9, -1], [12, 13, 10, 11]]
    assert torch.equal(state["keys"][2, 1].cpu(), k[2]) and state["seen"].tolist() == [1, 11, 14]


@device_matrix
@BACKENDS
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)], ids=["bf16", "fp16"])
def test_half_precision(device: str, backend: str, dtype: torch.dtype, limit: float) -> None:
    if device == "cpu":
        emulate_bf16()
    shape = (2, 2, 2, 64, 6, 10)
    q, k, v = draw(shape, device, dtype)
    state = ring(2, 6, 2, 64, device, dtype)
    got = torch.stack([window_step_(q[:, i], k[:, i], v[:, i], **state, scale=0.125, backend=backend) for i in range(10)], 1)
    assert got.dtype == dtype and relative(got, exact(q, k, v, 6, 0.125)) < limit


@device_matrix
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("keys", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), "dense"),
        ("values", lambda x: x.double(), "dense"),
        ("places", lambda x: x[:, :3], "places are"),
        ("seen", lambda x: x[:1], "places are"),
        ("places", lambda x: x.int(), "int64"),  # a place later than any other does not fit into 32 bits
        ("seen", lambda x: x.int(), "int64"),
    ],
)
def test_rings_that_cannot_be_changed_in_place(device: str, name: str, change: Any, message: str) -> None:
    state = ring(2, 4, 2, 16, device)
    x = torch.randn(2, 2, 16, device=device)
    with pytest.raises(ValueError, match=message):
        window_step_(x, x, x, **state | {name: change(state[name])}, scale=1.0, backend="triton")


@device_matrix
@pytest.mark.parametrize(("b", "h", "g", "d"), [(1, 2, 2, 16), (2, 3, 2, 16), (2, 2, 1, 16), (2, 2, 2, 8)])
def test_tokens_that_do_not_fit_the_ring(device: str, b: int, h: int, g: int, d: int) -> None:
    """The ring says how many rows and heads there are: what lies behind fewer would be read and written."""
    q, k = torch.randn(b, h, d, device=device), torch.randn(b, g, d, device=device)
    with pytest.raises(ValueError, match="does not fit"):
        window_step_(q, k, k, **ring(2, 4, 2, 16, device), scale=1.0, backend="triton")


@device_matrix
@BACKENDS
def test_a_window_of_nothing_keeps_nothing(device: str, backend: str) -> None:
    """A token sees itself alone. A ring of no entries would have no room for what a step leaves."""
    layer = SoftmaxAttention(SoftmaxAttention.Config(hidden_size=16, num_heads=2, window=0)).to(device)
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        y, state = layer.step(x, layer.init_state(2, torch.float32, device), Context(backend=backend, in_place=True))
        expected = layer.out_proj(layer.v_proj(x))
    assert torch.allclose(y, expected, atol=1e-6) and state["keys"].shape == (2, 0, 2, 8)
    if backend == "triton":
        empty, token = ring(2, 0, 2, 8, device), torch.zeros(2, 2, 8, device=device)
        with pytest.raises(ValueError, match="one entry or more"):
            window_step_(token, token, token, **empty, scale=1.0, backend=backend)


@device_matrix
@BACKENDS
@pytest.mark.parametrize("kind", ["sliding", "grouped"])
def test_a_layer_goes_on_in_place_from_a_prefill(device: str, backend: str, kind: str) -> None:
    """Steps in place, rotated, against the layer over the whole text; the prefill is padded on the left in one row."""
    layer = {
        "sliding": SlidingAttention(SlidingAttention.Config(hidden_size=32, num_heads=2, window=5)),
        "grouped": SoftmaxAttention(
            SoftmaxAttention.Config(hidden_size=32, num_heads=4, window=5, kv_heads=2, positions="rotary", rotary_fraction=0.5)
        ),
    }[kind].to(device)
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones(2, 7, device=device)
    mask[1, :3] = 0
    with torch.no_grad():
        _, state = layer(x[:, :7], Context(mask=mask, backend="torch"), layer.init_state(2, torch.float32, device))
        expected = [layer(x[:1], Context(backend="torch"))[0], layer(x[1:, 3:], Context(backend="torch"))[0]]
        before = dict(state)
        for i in range(7, 16):
            y, state = layer.step(x[:, i], state, Context(backend=backend, in_place=True))
            assert all(state[name] is before[name] for name in before)
            for row, late in ((0, 0), (1, 3)):
                assert torch.allclose(y[row], expected[row][0, i - late], atol=2e-6)
