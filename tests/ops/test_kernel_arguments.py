"""What kernels assume of their tensors: strides where a dimension has size 1, empty inputs, gradients that are not asked for,
half precision under strong decay, states changed in place.

fp32 limits as in `test_metala_triton.py`. fp16 has 11 bits: outputs 1.25e-3 and gradients 5e-3, at every gate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the fused kernels need Triton: pip install triton")

from megatron.ops import kernel_arguments
from megatron.ops.conv import causal_conv, conv_step_
from megatron.ops.conv.triton import conv_step_in_place
from megatron.ops.cross_entropy import row_gradient_, row_stats
from megatron.ops.kernel_arguments import token_rows, token_stride
from megatron.ops.metala import cut_packed, metala, metala_packed, metala_step_
from megatron.ops.metala.triton import metala_step_in_place
from megatron.ops.norm import add_norm, norm
from megatron.ops.selective_scan import selective_scan
from megatron.ops.taylor import taylor
from tests.ops.fused_cases import device_matrix, relative
from tests.ops.test_metala_triton import draw, errors


def packed_results(packed: Tensor, w: Tensor, backend: str) -> list[Tensor]:
    """y, the last state, and gradients of both from fixed upstream gradients."""
    y, final = metala_packed(packed, w, backend=backend)
    gen = torch.Generator().manual_seed(5)
    ups = [torch.randn(x.shape, generator=gen).to(x) for x in (y, final)]
    return [y, final, *torch.autograd.grad((y * ups[0]).sum() + (final * ups[1]).sum(), (packed, w))]


@device_matrix
@pytest.mark.parametrize(("b", "t"), [(3, 1), (1, 1), (3, 2)])
def test_packed_gradients_of_single_tokens(device: str, b: int, t: int) -> None:
    """A token dimension of size 1 has any stride; the row stride is then that of the batch."""
    h, k, v = 2, 16, 32
    gen = torch.Generator().manual_seed(0)
    packed = torch.randn(b, t, h * (2 * k + 2 * v), generator=gen)
    packed[..., h * k : 2 * h * k] -= (
        8  # keys near 1: else a first token's head is nearly constant, and its norm amplifies rounding
    )
    packed = packed.to(device).requires_grad_()
    w = torch.randn(h, k, generator=gen).to(device).requires_grad_()
    exact = [x.detach().cpu().double().requires_grad_() for x in (packed, w)]
    results = zip(packed_results(packed, w, "triton"), packed_results(exact[0], exact[1], "reference"), strict=True)
    assert max(relative(fused, plain) for fused, plain in results) < 1e-5


@pytest.mark.parametrize("shape", [(3, 1, 2, 4), (3, 5, 2, 4), (1, 5, 2, 4), (1, 1, 2, 4), (3, 1, 8), (3, 5, 8)])
def test_rows_of_columns_are_not_copied(shape: tuple[int, ...]) -> None:
    """Columns of a packed projection are read where they are; token (i, j) is row i t + j of `token_stride`."""
    b, t = shape[:2]
    width = torch.Size(shape[2:]).numel()
    packed = torch.arange(b * t * 3 * width).view(b, t, 3 * width)
    x = packed[..., width : 2 * width].unflatten(-1, shape[2:])
    rows = token_rows(x)
    assert rows.data_ptr() == x.data_ptr()
    for row in range(b * t):
        at = torch.as_strided(packed, (width,), (1,), x.storage_offset() + row * token_stride(x))
        assert torch.equal(at, x.reshape(b * t, width)[row])
    for other in (
        x.transpose(-1, -2) if len(shape) == 4 else x[..., ::2],
        x.expand(2, *shape)[:, :, 0] if t == 1 else x[:, ::2],
    ):
        copy = token_rows(other)
        assert torch.equal(copy, other)
        assert torch.equal(torch.as_strided(copy, (copy[0, 0].numel(),), (1,), copy.storage_offset()), copy[0, 0].flatten())


@device_matrix
@pytest.mark.parametrize("k", [16, 64])
@pytest.mark.parametrize("gate_mean", [-8.0, -20.0])
def test_fp16_under_strong_decay(device: str, gate_mean: float, k: int) -> None:
    """Operands of scores leave fp16's range when half a tile decays by more than 2^16: they are wider than their inputs.

    A GPU cuts them to the ten bits of tf32, the interpreter does not: 6.6e-3 in a gradient on an H100.
    """
    found = errors(draw(k, 2 * k, 70, torch.float16, gate_mean, device), with_state=True)
    assert max(found[:2]) <= 1.25e-3 and max(found[2:]) <= (1e-2 if device == "cuda" else 5e-3), found


@device_matrix
def test_no_gradient_beyond_the_clamp(device: str) -> None:
    """Below -40 the forward is constant in the gate logits."""
    q, z, v, g, w, _ = draw(16, 32, 20, torch.float32, 0.0, device)
    with torch.no_grad():
        z[:, ::2] = -60.0
    y, _ = metala(q, z, v, g, w, backend="triton")
    (dz,) = torch.autograd.grad((y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)).sum(), z)
    assert not dz[:, ::2].any() and dz[:, 1::2].abs().min() > 0


@device_matrix
@pytest.mark.parametrize("used", ["y", "final"])
def test_only_one_output_is_used(device: str, used: str) -> None:
    """The other one's gradient is never formed; what comes back is that of the plain path."""
    results = []
    for backend in ("reference", "triton"):
        leaves = draw(16, 32, 40, torch.float32, 2.0, device)
        outputs = dict(zip(("y", "final"), metala(*leaves[:5], state=leaves[5], backend=backend), strict=True))
        up = torch.randn(outputs[used].shape, generator=torch.Generator().manual_seed(1)).to(leaves[0])
        results.append(torch.autograd.grad((outputs[used] * up).sum(), leaves, materialize_grads=True))
    for plain, fused in zip(*results, strict=True):
        assert relative(fused, plain) < 1e-5 or not plain.any()


@device_matrix
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("b", "t"), [(0, 5), (2, 0)])
def test_empty_inputs(device: str, b: int, t: int, backend: str) -> None:
    """No rows or no tokens: empty outputs, the state as it came, zero gradients of weights."""
    h, k, v = 2, 16, 32
    x = torch.randn(b, t, h * (2 * k + 2 * v), device=device, requires_grad=True)
    w = torch.randn(h, k, device=device, requires_grad=True)
    state = torch.randn(b, h, k, v, device=device, requires_grad=True)
    y, final = metala_packed(x, w, state=state, backend=backend)
    assert y.shape == (b, t, h, v) and torch.equal(final, state)
    dx, dw, dstate = torch.autograd.grad(y.sum() + (2 * final).sum(), (x, w, state), materialize_grads=True)
    assert dx.shape == x.shape and not dw.any() and torch.equal(dstate, torch.full_like(state, 2))
    weight = torch.randn(8, 1, 4, device=device, requires_grad=True)
    tokens = torch.randn(b, t, 8, device=device, requires_grad=True)
    convolved = causal_conv(tokens, weight, backend=backend)
    assert convolved.shape == tokens.shape
    assert not torch.autograd.grad(convolved.sum(), weight)[0].any()
    gain = torch.ones(8, device=device, requires_grad=True)
    assert norm(tokens, gain, None, centred=False, eps=1e-5, backend=backend).shape == tokens.shape


@device_matrix
@pytest.mark.parametrize(("k", "v", "dtype"), [(16, 32, torch.float64), (136, 20, torch.float32), (16, 300, torch.float32)])
def test_what_no_kernel_takes_runs_on_the_plain_path(device: str, k: int, v: int, dtype: torch.dtype) -> None:
    """fp64 and wider heads, in a pass with its gradients and in a step."""
    results = []
    for backend in ("torch", "triton"):
        gen = torch.Generator().manual_seed(0)
        x = torch.randn(2, 5, 2 * (2 * k + 2 * v), generator=gen).to(device, dtype).requires_grad_()
        w, state = (torch.randn(*s, generator=gen).to(device, dtype) for s in ((2, k), (2, 2, k, v)))
        y, final = metala_packed(x, w, state=state, backend=backend)
        (dx,) = torch.autograd.grad(y.sum() + final.sum(), x)
        q, z, values, g = (t[:, 0] for t in cut_packed(x.detach(), w))
        results.append([y, final, dx, metala_step_(q, z, values, g, w, state, backend=backend), state])
    assert all(torch.equal(plain, fused) for plain, fused in zip(*results, strict=True))


def _operators(backend: str, narrow: bool) -> list[Tensor]:
    """Outputs of the operators with inputs that broadcast (`narrow`), or that are expanded before."""

    def r(*shape: int, over: int = 0) -> Tensor:
        """Random numbers, of which dimension `over` - 1 has size 1 or is expanded from it."""
        if not over:
            return torch.randn(shape, generator=gen)
        one = torch.randn([1 if i == over - 1 else n for i, n in enumerate(shape)], generator=gen)
        return one if narrow else one.expand(shape).contiguous()

    gen = torch.Generator().manual_seed(0)
    b, s, h, k, v, d = 2, 5, 2, 16, 16, 32
    ids = (torch.arange(s) // 3).expand(1 if narrow else b, s)
    mask = (torch.arange(s) > 0).long().expand(1 if narrow else b, s)
    metala_inputs = r(b, s, h, k), r(b, s, h, k, over=3), r(b, s, h, v), r(b, s, h, v, over=1), r(h, k, over=1)
    outputs = [*metala(*metala_inputs, state=r(b, h, k, v, over=1), mask=mask, segment_ids=ids, backend=backend)]
    features = r(b, s, h, k), r(b, s, h, k, over=3), r(b, s, h, v)
    outputs += taylor(*features, state=r(b, h, 153, v + 1, over=1).abs(), segment_ids=ids, backend=backend)
    rates = -r(d, 8).abs()
    steps = r(b, s, d).abs()
    scanned = r(b, s, d), steps, rates, r(b, s, 8, over=1), r(b, s, 8)
    outputs += selective_scan(*scanned, state=r(b, d, 8, over=1), segment_ids=ids, backend=backend)
    history = r(b, 3, d, over=1)
    outputs.append(causal_conv(r(b, s, d), r(d, 1, 4), r(2 * d)[::2], history=history, segment_ids=ids, backend=backend))
    outputs.append(norm(r(b, s, d), r(2 * d)[::2], r(d), centred=True, eps=1e-5, backend=backend))
    outputs += add_norm(r(b, s, d), r(b, s, d, over=2), r(2 * d)[::2], None, centred=False, eps=1e-5, backend=backend)
    return outputs


def test_inputs_are_broadcast_as_on_the_plain_path() -> None:
    """A mask or document ids [1, s], a state for all rows, heads that share a gate, parameters with gaps."""
    for wide, narrow in zip(_operators("torch", False), _operators("triton", True), strict=True):
        assert relative(narrow, wide) < 2e-5


@pytest.mark.parametrize(
    "call",
    [
        lambda x: metala(x, x, x, x, torch.ones(2, 16), mask=torch.ones(2, 4), backend="triton"),
        lambda x: metala(x, x, x[:, :4], x, torch.ones(2, 16), backend="triton"),
        lambda x: taylor(x, x[:, :4], x, backend="triton"),
        lambda x: causal_conv(x[..., 0], torch.ones(3, 1, 4), backend="triton"),
        lambda x: norm(x, torch.ones(8), None, centred=False, eps=1e-5, backend="triton"),
    ],
)
def test_shapes_that_do_not_broadcast_are_refused(call: Callable[[Tensor], Any]) -> None:
    with pytest.raises(ValueError, match="where .* is needed"):
        call(torch.ones(2, 5, 2, 16))


def test_interpreted_bf16_products_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_arguments, "bf16_is_emulated", False)
    x = torch.ones(1, 2, 1, 16, dtype=torch.bfloat16)
    for call in (lambda: metala(x, x, x, x, x[0, 0], backend="triton"), lambda: taylor(x, x, x, backend="triton")):
        with pytest.raises(ValueError, match="cannot multiply bf16"):
            call()


def step_arguments(device: str) -> dict[str, Any]:
    gen = torch.Generator().manual_seed(0)
    shapes = {"q": (2, 3, 16), "z": (2, 3, 16), "v": (2, 3, 32), "g": (2, 3, 32), "w": (3, 16), "state": (5, 3, 16, 32)}
    return {name: torch.randn(*shape, generator=gen).to(device) for name, shape in shapes.items()}


@device_matrix
@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("state", lambda device: torch.zeros(5, 3, 32, 16, device=device).transpose(2, 3), "dense"),
        ("state", lambda device: torch.zeros(1, 3, 16, 32, device=device).expand(5, -1, -1, -1), "dense"),
        ("state", lambda device: torch.zeros(5, 3, 16, 32, dtype=torch.bfloat16, device=device), "dense"),
        ("state", lambda device: torch.zeros(5, 3, 16, 31, device=device), "dense"),
        ("state", lambda device: torch.zeros(1, 3, 16, 32, device=device), "as many rows of state"),
        ("slots", lambda device: torch.tensor([0.0, 1.0], device=device), "slots are 2 integers"),
        ("slots", lambda device: torch.tensor([0, 1, 2], device=device), "slots are 2 integers"),
        ("slots", lambda device: torch.tensor([0, 9, 1, 9], device=device)[::2], "slots are dense"),
    ],
)
def test_states_that_cannot_be_changed_in_place(device: str, name: str, make: Callable[[str], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metala_step_in_place(**step_arguments(device) | {name: make(device)})


@device_matrix
def test_windows_that_cannot_be_changed_in_place(device: str) -> None:
    x, weight = torch.randn(2, 8, device=device), torch.randn(8, 1, 4, device=device)
    for window in (
        torch.zeros(2, 8, 3, device=device).transpose(1, 2),
        torch.zeros(2, 3, 8, device=device, dtype=torch.bfloat16),
    ):
        with pytest.raises(ValueError, match="dense"):
            conv_step_in_place(x, weight, window)


@device_matrix
def test_labels_with_strides(device: str) -> None:
    """Every second label of a longer row."""
    gen = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 50, generator=gen), torch.randint(0, 50, (12,), generator=gen).to(device)[::2]
    assert not labels.is_contiguous()
    plain, fused = logits.clone().to(device), logits.clone().to(device)
    statistics = [row_stats(x, labels, backend) for x, backend in ((plain, "torch"), (fused, "triton"))]
    for a, b in zip(*statistics, strict=True):
        assert (a - b).abs().max() < 1e-5
    weights = torch.rand(6, generator=gen).to(device)
    for x, (peak, total, _), backend in ((plain, statistics[0], "torch"), (fused, statistics[1], "triton")):
        row_gradient_(x, labels, peak, total, weights, backend)
    assert (plain - fused).abs().max() < 1e-6


@device_matrix
def test_fp64_keeps_its_precision(device: str) -> None:
    """Kernels compute in fp32; whoever asks for fp64 gets the plain path's numbers, as the reference of a test must."""
    gen = torch.Generator().manual_seed(0)
    x, added, gain = (torch.randn(*shape, generator=gen).double().to(device) / 3 for shape in ((2, 5, 8), (2, 5, 8), (8,)))
    taps, labels = torch.randn(8, 1, 4, generator=gen).double().to(device) / 3, torch.tensor([1, 7], device=device)
    found = []
    for backend in ("torch", "triton"):
        window, logits = torch.full((2, 3, 8), 1 / 3, dtype=torch.float64, device=device), x[:, 0].clone()
        statistics = row_stats(logits, labels, backend)
        row_gradient_(logits, labels, statistics[0], statistics[1], gain[:2], backend)
        found.append(
            [
                norm(x, gain, None, centred=True, eps=1e-5, backend=backend),
                *add_norm(x, added, gain, None, centred=False, eps=1e-5, backend=backend),
                causal_conv(x, taps, backend=backend),
                conv_step_(x[:, 0], taps, window, backend=backend),
                *(window, logits, *statistics),
            ]
        )
    assert all(fused.dtype == torch.float64 and torch.equal(fused, plain) for plain, fused in zip(*found, strict=True))
