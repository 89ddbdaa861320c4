"""The fused kernels of MetaLA and the convolution: rounding, strides, steps in place, custom operators, training on a GPU.

On the CPU by Triton's interpreter, the same list on a GPU. Values and gradients of the MetaLA operator are held by
`test_metala_recurrence.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the fused kernels need Triton: pip install triton")

from megatron.engine.base import EngineSettings
from megatron.ops.conv import causal_conv
from megatron.ops.conv import triton as conv_triton
from megatron.ops.conv.triton import conv_forward, conv_step_in_place
from megatron.ops.metala import metala, metala_step
from megatron.ops.metala.triton import metala_step_in_place
from tests.engine.engine_cases import model_config, train
from tests.ops.fused_cases import NO_GPU, device_matrix, mostly_slow
from tests.ops.triton_bf16 import emulate_bf16


def draw(k: int, v: int, t: int, dtype: torch.dtype, gate_mean: float, device: str) -> list[Tensor]:
    """q, z, v, g, w, state: leaves in `dtype` (state fp32)."""
    g = torch.Generator().manual_seed(t + k)
    b, h = 1, 2
    shapes = [(b, t, h, k), (b, t, h, k), (b, t, h, v), (b, t, h, v), (h, k), (b, h, k, v)]
    leaves = [torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes]
    leaves[1] = leaves[1] * 1.5 + gate_mean
    leaves[4] = leaves[4] * 0.3
    return [x.to(device, dtype if i < 5 else torch.float32).requires_grad_() for i, x in enumerate(leaves)]


def run(
    leaves: list[Tensor], backend: str, with_state: bool, ids: Tensor | None, mask: Tensor | None, gate_round: str
) -> list[Tensor]:
    state = leaves[5] if with_state else None
    y, final = metala(*leaves[:5], state=state, segment_ids=ids, mask=mask, gate_round=gate_round, backend=backend)
    gen = torch.Generator().manual_seed(3)
    ups = [torch.randn(x.shape, generator=gen, dtype=torch.float64).to(x.device) for x in (y, final)]
    total = sum((x.double() * up).sum() for x, up in zip((y, final), ups, strict=True))
    return [y, final, *torch.autograd.grad(total, leaves if with_state else leaves[:5])]


def errors(
    leaves: list[Tensor],
    with_state: bool = False,
    ids: Tensor | None = None,
    mask: Tensor | None = None,
    gate_round: str = "none",
) -> list[float]:
    """Relative norms of (y, final state, dq, dz, dv, dg, dw[, dstate]) against fp64 on the same inputs."""
    exact = [x.detach().cpu().double().requires_grad_() for x in leaves]
    on_cpu = [None if t is None else t.cpu() for t in (ids, mask)]
    want = run(exact, "reference", with_state, *on_cpu, gate_round)
    got = run(leaves, "triton", with_state, ids, mask, gate_round)
    return [((a - b.cpu().double()).norm() / a.norm().clamp_min(1e-30)).item() for a, b in zip(want, got, strict=True)]


@device_matrix
def test_gate_rounding_switch(device: str) -> None:
    """The kernel rounds where the plain path rounds; a logit near a rounding boundary may fall on the other side, hence
    2e-2."""
    if device == "cpu":
        emulate_bf16()
    leaves = [x.detach() for x in draw(32, 64, 70, torch.float32, 2.0, device)]
    rounded, _ = metala(*leaves[:5], gate_round="bf16", backend="triton")
    plain, _ = metala(*leaves[:5], gate_round="bf16", backend="reference")
    exact, _ = metala(*leaves[:5], backend="reference")
    assert (rounded - plain).norm() / plain.norm() < 2e-2
    assert (plain - exact).norm() / exact.norm() > 2e-3


@device_matrix
def test_reads_one_packed_projection_through_strides(device: str) -> None:
    h, k, v, t = 2, 16, 32, 50
    g = torch.Generator().manual_seed(0)
    packed = torch.randn(2, t, h * (2 * k + 2 * v), generator=g).to(device)
    parts = packed.split([h * k, h * k, h * v, h * v], dim=-1)
    q, z, vv, gate = (p.unflatten(-1, (h, -1)) for p in (parts[0], parts[2 - 1], parts[2], parts[3]))
    w = torch.randn(h, k, generator=g).to(device)
    y, _ = metala(q, z, vv, gate, w, backend="triton")
    want, _ = metala(q, z, vv, gate, w, backend="reference")
    assert (y - want).abs().max() < 1e-4


def pages(count: int, *shape: int, generator: torch.Generator, device: str) -> Tensor:
    """Random states [count, *shape] with something else between two of them, as in a server's pages."""
    size = math.prod(shape)
    return torch.randn(count, size + 21, generator=generator).to(device)[:, 5 : 5 + size].unflatten(1, shape)


@device_matrix
def test_decode_step_in_place_with_slots(device: str) -> None:
    g = torch.Generator().manual_seed(0)
    q, z, v, gate, w = (
        torch.randn(*s, generator=g).to(device) for s in ((2, 3, 24), (2, 3, 24), (2, 3, 48), (2, 3, 48), (3, 24))
    )
    pool = pages(6, 3, 24, 48, generator=g, device=device)
    before, slots = pool.clone(), torch.tensor([4, 1], device=device)
    y = metala_step_in_place(q, z, v, gate, w, pool, slots)
    want, state = metala_step(q, z, v, gate, w, before[slots])
    assert (y - want).abs().max() < 1e-5 and (pool[slots] - state).abs().max() < 1e-5
    others = [0, 2, 3, 5]
    assert not pool.is_contiguous() and torch.equal(pool[others], before[others])


@device_matrix
@mostly_slow("t", [1, 2, 3], [14, 65])
@pytest.mark.parametrize("width", [2, 4, 5])
@pytest.mark.parametrize("extras", [False, True])
def test_convolution(device: str, t: int, width: int, extras: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain, and with bias, history and documents: every value and gradient, fp32; five taps have no kernel backward."""
    if device == "cpu" and t < 5:
        monkeypatch.setattr(conv_triton, "ROWS", 5)  # the interpreter walks over all rows of a program, however few are there
    g = torch.Generator().manual_seed(t)
    x, w, bias, history = (
        torch.randn(*s, generator=g).to(device).requires_grad_()
        for s in ((2, t, 70), (70, 1, width), (70,), (2, width - 1, 70))
    )
    ids = (torch.rand(2, t, generator=g) < 0.1).cumsum(1).to(device) if extras else None
    leaves = [x, w, bias, history] if extras else [x, w]
    results = []
    for backend in ("reference", "triton"):
        y = causal_conv(x, w, bias if extras else None, history=history if extras else None, segment_ids=ids, backend=backend)
        up = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device)
        results.append([y, *torch.autograd.grad((y * up).sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max() + 1e-7


def test_the_rows_of_a_convolution_backward_follow_the_length() -> None:
    """Its loop steps over `UNROLLED` rows and reads three more."""
    assert [conv_triton.tile_rows(t) for t in (1, 13, 14, 29, 30, 4096)] == [13, 13, 29, 29, 61, 61]
    assert all((conv_triton.tile_rows(t) + 3) % conv_triton.UNROLLED == 0 for t in range(1, 99))


@device_matrix
def test_convolution_gate_and_step(device: str) -> None:
    g = torch.Generator().manual_seed(0)
    x, w, gate = (torch.randn(*s, generator=g).to(device).requires_grad_() for s in ((2, 70, 33), (33, 1, 3), (2, 70, 33)))
    fused, plain = conv_forward(x, w, None, gate, None, None, True), causal_conv(x, w, backend="reference") * gate
    for a, b in zip(
        torch.autograd.grad(plain.sum(), (x, w, gate)), torch.autograd.grad(fused.sum(), (x, w, gate)), strict=True
    ):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()
    window = pages(5, 2, 33, generator=g, device=device)
    before, slots = window.clone(), torch.tensor([3, 1], device=device)
    y = conv_step_in_place(x[:, 0].detach(), w.detach(), window, gate=gate[:, 0].detach(), slots=slots)
    want = causal_conv(x[:, :1], w, history=before[slots], backend="reference")[:, 0] * gate[:, 0]
    assert (y - want).abs().max() < 1e-5
    assert torch.equal(window[slots], torch.cat([before[slots][:, 1:], x[:, :1]], 1))


@device_matrix
def test_custom_operators_are_whole(device: str) -> None:
    """Schema, fake tensors and autograd registration, as torch's own checker sees them."""
    leaves = draw(16, 32, 20, torch.float32, 2.0, device)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.linear_neox.metala_forward.default, (*leaves, None, None, 0, True), test_utils=checks)
    x, w = torch.randn(2, 9, 8, device=device, requires_grad=True), torch.randn(8, 1, 4, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.linear_neox.conv_forward.default, (x, w, None, None, None, None, True), test_utils=checks)


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU, reason="no CUDA device; tests/test_main_job.py trains with the interpreted kernels")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_on_a_gpu_is_that_of_the_plain_path(dtype: str) -> None:
    """Three steps of a small model through the engine, loss by blocks included: fp32 to 1e-4 (tf32 products), bf16 to 2e-2."""
    settings = EngineSettings(dtype=dtype, gradient_accumulation=2, loss_chunk_tokens=32)
    plain, fused = (
        train(1, 1, "single", replace(settings, kernel_backend=backend), model_config(), 3)["losses"]
        for backend in ("torch", "triton")
    )
    limit = 1e-4 if dtype == "fp32" else 2e-2
    assert all(abs(a - b) <= limit * a for a, b in zip(plain, fused, strict=True)), (plain, fused)
