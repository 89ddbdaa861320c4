"""The gated product against its formula in fp64: three activations, halves of a packed projection, strides, odd sizes.

fp32: 2e-6 of the norm. bf16 and fp16: one rounding of each result, 2^-8 and 2^-11 of it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron.ops.gated import GATES, gated, gated_packed
from tests.ops.fused_cases import device_matrix, relative, results
from tests.ops.triton_bf16 import emulate_bf16

pytest.importorskip("triton", reason="the fused kernels need Triton: pip install triton")

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda a: a / (1 + torch.exp(-a)),
    "gelu": lambda a: a * 0.5 * (1 + torch.erf(a / 2**0.5)),
    "gelu_tanh": lambda a: a * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (a + 0.044715 * a**3))),
}
BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])


def draw(*shape: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=gen, dtype=torch.float64)).to(device, dtype).requires_grad_()


def exact(activation: str, *leaves: Tensor) -> list[Tensor]:
    """y and the gradients in fp64, of a and b or of both side by side."""
    wide = [x.detach().cpu().double().requires_grad_() for x in leaves]

    def run(*x: Tensor) -> list[Tensor]:
        a, b = x if len(x) == 2 else x[0].chunk(2, -1)
        return [FORMULAS[activation](a) * b]

    return results(run, wide)


@device_matrix
@BACKENDS
@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("shape", [(3, 5, 40), (2, 1, 7), (1, 1), (6, 1), (9, 1030)])
def test_result_and_gradients(device: str, backend: str, activation: str, shape: tuple[int, ...]) -> None:
    a, b = (draw(*shape, device=device, seed=i) for i in range(2))
    got = results(lambda a, b: [gated(a, b, activation, backend)], [a, b])
    assert max(relative(x, y) for x, y in zip(got, exact(activation, a, b), strict=True)) < 2e-6
    packed = draw(*shape[:-1], 2 * shape[-1], device=device, seed=2)
    got = results(lambda x: [gated_packed(x, activation, backend)], [packed])
    assert got[1].is_contiguous()
    assert max(relative(x, y) for x, y in zip(got, exact(activation, packed), strict=True)) < 2e-6


@device_matrix
@BACKENDS
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)], ids=["bf16", "fp16"])
@pytest.mark.parametrize("activation", FORMULAS)
def test_half_precision(device: str, backend: str, activation: str, dtype: torch.dtype, limit: float) -> None:
    """The fused path rounds once; the plain one rounds the activation too."""
    if device == "cpu":
        emulate_bf16()
    a, b = (draw(4, 96, device=device, dtype=dtype, seed=i) for i in range(2))
    got = results(lambda a, b: [gated(a, b, activation, backend)], [a, b])
    assert [x.dtype for x in got] == [dtype] * 3
    off = [relative(x, y) for x, y in zip(got, exact(activation, a, b), strict=True)]
    assert max(off) < limit * (1 if backend == "triton" else 3), off


@device_matrix
def test_rows_that_lie_apart(device: str) -> None:
    """Columns of a wider tensor, an upstream gradient of every second column, one row repeated."""
    wide = draw(5, 60, device=device)
    a, b = wide[:, 3:23], draw(1, 20, device=device, seed=1).expand(5, 20)
    up = draw(5, 40, device=device, seed=2).detach()[:, ::2]
    found = [torch.autograd.grad((gated(x, y, "silu", backend) * up).sum(), (x, y)) for backend, x, y in (
        ("triton", a, b), ("reference", a, b)
    )]  # fmt: skip
    assert max(relative(x, y) for x, y in zip(*found, strict=True)) < 2e-6


@device_matrix
def test_extreme_values(device: str) -> None:
    """The sigmoid's exponential overflows below -88 and vanishes above."""
    a = torch.tensor([-1e4, -100.0, -88.8, 0.0, 88.8, 1e4], device=device).requires_grad_()
    b = torch.full_like(a, 2.0).detach().requires_grad_()
    for activation in FORMULAS:
        y = gated(a, b, activation, "triton")
        assert torch.equal(y.detach().cpu(), 2 * torch.tensor([0.0, 0.0, 0.0, 0.0, 88.8, 1e4]))
        da, db = torch.autograd.grad(y.sum(), (a, b))
        assert torch.equal(da.cpu(), torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0, 2.0]))
        assert torch.equal(db.cpu(), y.detach().cpu() / 2)


@device_matrix
@BACKENDS
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_empty(device: str, backend: str, shape: tuple[int, ...]) -> None:
    a, b = draw(*shape, device=device), draw(*shape, device=device)
    y = gated(a, b, "silu", backend)
    assert y.shape == shape and torch.autograd.grad(y.sum(), a)[0].shape == shape
    packed = draw(*shape[:-1], 2 * shape[-1], device=device)
    y = gated_packed(packed, "silu", backend)
    assert y.shape == shape and torch.autograd.grad(y.sum(), packed)[0].shape == packed.shape


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_only_the_inputs_are_kept(backend: str) -> None:
    """Of a step's activations: neither act(a) nor a copy of a half."""
    if torch.cuda.is_available() and backend == "triton":
        pytest.skip("on a GPU machine kernels are compiled, not interpreted")
    packed, stored = draw(4, 32, device="cpu"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: stored.append(x) or x, lambda x: x):
        gated(*packed.chunk(2, -1), "silu", backend)
        gated_packed(packed, "silu", backend)
    assert {x.untyped_storage().data_ptr() for x in stored} == {packed.untyped_storage().data_ptr()}


def test_the_plain_form_is_that_of_autograd() -> None:
    """The same bits as the formula in PyTorch's own operators, in every dtype; and a second derivative."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for activation in GATES:
            a, b = (draw(3, 24, device="cpu", dtype=dtype, seed=i) for i in range(2))
            got, plain = (results(lambda a, b: [gated(a, b, activation, name)], [a, b]) for name in ("torch", "reference"))  # noqa: B023
            assert all(torch.equal(x, y) for x, y in zip(got, plain, strict=True))
    a, b = (draw(2, 3, device="cpu", dtype=torch.float64, seed=i) for i in range(2))
    for activation in FORMULAS:
        assert torch.autograd.gradgradcheck(lambda a, b: gated(a, b, activation, "torch"), (a, b))  # noqa: B023


@device_matrix
def test_operators_are_whole(device: str) -> None:
    from megatron.ops.gated.triton import gated_forward

    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    a, b = draw(2, 3, 8, device=device), draw(2, 3, 8, device=device)
    torch.library.opcheck(gated_forward, (a, b, "silu"), test_utils=checks)
    torch.library.opcheck(gated_forward, (a, None, "gelu"), test_utils=checks)
