"""Fused norms against the plain form in fp64: five kinds, the addition in front, a wider stream, odd widths, many rows.

fp32: 2e-6 of the norm (one reduction over the row). bf16: 4e-3, one rounding of the result (2^-8); the statistics are fp32.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the fused kernels need Triton: pip install triton")

from megatron.ops.norm import add_norm, norm
from megatron.ops.norm import triton as norm_triton
from megatron.ops.norm.triton import norm_forward
from tests.ops.fused_cases import device_matrix, relative, results
from tests.ops.triton_bf16 import emulate_bf16


def draw(*shapes: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(len(shapes))
    return [(torch.randn(*s, generator=g, dtype=torch.float64) + 0.3).to(device, dtype).requires_grad_() for s in shapes]


def exactly(leaves: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in leaves]


@device_matrix
@pytest.mark.parametrize(("gain", "shift", "centred"), [(0, 0, 0), (1, 0, 0), (1, 1, 1), (1, 0, 1), (0, 0, 1)])
@pytest.mark.parametrize(("rows", "d"), [(1, 8), (5, 40), (70, 96)])
def test_every_kind(device: str, gain: int, shift: int, centred: int, rows: int, d: int) -> None:
    leaves = draw((rows, d), *[(d,)] * (gain + shift), device=device)

    def run(backend: str, x: Tensor, *rest: Tensor) -> list[Tensor]:
        weight, bias = (*rest, None, None)[:2]
        return [norm(x, weight, bias, centred=bool(centred), eps=1e-5, backend=backend)]

    exact = results(lambda *x: run("reference", *x), exactly(leaves))
    got = results(lambda *x: run("triton", *x), leaves)
    assert max(relative(a, b) for a, b in zip(got, exact, strict=True)) < 2e-6


@device_matrix
@pytest.mark.parametrize("centred", [False, True])
def test_addition_in_front(device: str, centred: bool) -> None:
    """Both results are used, so that the gradient of the sum has two parts."""
    leaves = draw((3, 7, 40), (3, 7, 40), (40,), device=device)

    def run(backend: str, x: Tensor, added: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return add_norm(x, added, weight, None, centred=centred, eps=1e-6, backend=backend)

    exact = results(lambda *x: run("reference", *x), exactly(leaves))
    got = results(lambda *x: run("triton", *x), leaves)
    assert max(relative(a, b) for a, b in zip(got, exact, strict=True)) < 2e-6
    total, y = run("triton", *leaves)
    (alone,) = torch.autograd.grad(total.sum(), leaves[1], retain_graph=True)
    assert torch.equal(alone, torch.ones_like(alone))  # the norm is not used: what comes back is the sum's own gradient
    (other,) = torch.autograd.grad(y.sum(), leaves[0])
    (want,) = torch.autograd.grad(run("torch", *leaves)[1].sum(), leaves[0])
    assert relative(other, want) < 1e-5


@device_matrix
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_bf16_and_the_wider_stream(device: str, stream: torch.dtype) -> None:
    if device == "cpu":
        emulate_bf16()
    (x,), (added, weight) = (
        draw((9, 64), device=device, dtype=stream),
        draw((9, 64), (64,), device=device, dtype=torch.bfloat16),
    )

    def run(backend: str, dtype: torch.dtype, *leaves: Tensor) -> tuple[Tensor, Tensor]:
        x, added, weight = leaves
        return add_norm(x, added, weight, None, centred=False, eps=1e-6, dtype=dtype, backend=backend)

    leaves = [x, added, weight]
    exact = results(lambda *x: run("reference", torch.float64, *x), exactly(leaves))
    got = results(lambda *x: run("triton", torch.bfloat16, *x), leaves)
    assert [t.dtype for t in got] == [stream, torch.bfloat16, stream, torch.bfloat16, torch.bfloat16]
    assert max(relative(a, b) for a, b in zip(got, exact, strict=True)) < 4e-3


@device_matrix
def test_few_parts_walk_over_many_rows(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_triton, "_PARTS", 2)
    monkeypatch.setattr(norm_triton, "norm_cut", lambda d: (4, 4))
    leaves = draw((27, 24), (24,), (24,), device=device)
    found = [
        results(lambda x, w, b: [norm(x, w, b, centred=True, eps=1e-5, backend=name)], leaves)  # noqa: B023
        for name in ("reference", "triton")
    ]
    assert max(relative(a, b) for a, b in zip(*found, strict=True)) < 2e-6


@device_matrix
def test_operator_is_whole(device: str) -> None:
    x, added, weight = draw((3, 8), (3, 8), (8,), device=device)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(norm_forward, (x, added, weight, None, True, 1e-5, torch.float32), test_utils=checks)
    torch.library.opcheck(norm_forward, (x, None, None, None, False, 1e-5, torch.float32), test_utils=checks)
