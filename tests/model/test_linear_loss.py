"""Output projection and loss in one, against the plain loss of the plain product in fp64: values and gradients, TP 1 and 2.

fp64 against fp64: 1e-12 (another order of the same sums). fp32: 2e-6 of the norm. bf16: the logits are rounded in both;
against the exact product the loss may differ by 5e-3 and gradients by 1e-2, the limits of our kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.errors import DataError
from megatron.model.linear_loss import linear_token_loss
from megatron.model.loss import token_loss
from megatron.parallel.collectives import CopyToTP
from megatron.parallel.mesh import Mesh
from tests.ops.fused_cases import device_matrix
from tests.parallel.ranks import run_ranks


def draw(dtype: torch.dtype = torch.float64, rows: int = 37) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [2, 19, 8], a matrix of 37 words, labels with one ignored, a mask of weights with zeros."""
    g = torch.Generator().manual_seed(0)
    x, matrix = (torch.randn(*s, generator=g, dtype=torch.float64).to(dtype) for s in ((2, 19, 8), (rows, 8)))
    labels, mask = torch.randint(0, 30, (2, 19), generator=g), torch.rand(2, 19, generator=g)
    mask[0, :5] = 0
    labels[1, 7] = -100
    return x.requires_grad_(), (matrix * 2).detach().requires_grad_(), labels, mask


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.detach().double() - exact.detach().double()).norm() / exact.detach().double().norm())


def plain(x: Tensor, matrix: Tensor, labels: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Loss, dx, dmatrix of the two steps, times 3 to see the upstream gradient."""
    x, matrix = (t.detach().double().requires_grad_() for t in (x, matrix))
    loss = token_loss(x @ matrix.t(), labels, mask)
    return [loss, *torch.autograd.grad(loss * 3, (x, matrix))]


@pytest.mark.parametrize("block", [1, 7, 38, 1000])
@pytest.mark.parametrize("masked", [True, False])
def test_equals_the_plain_loss(block: int, masked: bool) -> None:
    x, matrix, labels, mask = draw()
    weights = mask if masked else None
    loss = linear_token_loss(x, matrix, labels, weights, block=block)
    got = [loss, *torch.autograd.grad(loss * 3, (x, matrix))]
    assert max(relative(a, b) for a, b in zip(got, plain(x, matrix, labels, weights), strict=True)) < 1e-12


@device_matrix
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_fp32_on_both_paths(backend: str, device: str) -> None:
    pytest.importorskip("triton", reason="the fused kernels need Triton")
    x, matrix, labels, mask = (t.to(device) for t in draw(torch.float32))
    loss = linear_token_loss(x, matrix, labels, mask, block=16, backend=backend)
    got = [loss, *torch.autograd.grad(loss * 3, (x, matrix))]
    assert max(relative(a, b) for a, b in zip(got, plain(x, matrix, labels, mask), strict=True)) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_fp32(dtype: torch.dtype) -> None:
    """With a loss scale of 2^12, as fp16 has one: it acts on gradients that were not rounded away before it."""
    x, matrix, labels, mask = draw(dtype)
    loss = linear_token_loss(x, matrix, labels, mask, block=5)
    got = [loss, *(g.double() / 4096 for g in torch.autograd.grad(loss * 3 * 4096, (x, matrix)))]
    exact = plain(x, matrix, labels, mask)
    assert loss.dtype == torch.float32
    assert relative(got[0], exact[0]) < 5e-3 and max(relative(a, b) for a, b in zip(got[1:], exact[1:], strict=True)) < 1e-2


def test_nothing_counts() -> None:
    x, matrix, labels, mask = draw(torch.float32)
    loss = linear_token_loss(x, matrix, labels, mask * 0, block=7)
    grads = torch.autograd.grad(loss, (x, matrix))
    assert loss == 0 and all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_no_gradient_asked_for_makes_none() -> None:
    x, matrix, labels, mask = draw()
    with torch.no_grad():
        loss = linear_token_loss(x, matrix, labels, mask, block=7)
    assert torch.allclose(loss, token_loss(x @ matrix.t(), labels, mask)) and not loss.requires_grad
    frozen = linear_token_loss(x, matrix.detach(), labels, mask, block=7)
    assert relative(torch.autograd.grad(frozen * 3, x)[0], plain(x, matrix, labels, mask)[1]) < 1e-12


def test_a_label_outside_the_vocabulary_is_named() -> None:
    x, matrix, labels, mask = draw()
    labels[0, 9] = 37
    with pytest.raises(DataError, match="label id 37 is outside the vocabulary of 37"):
        linear_token_loss(x, matrix, labels, mask)


def test_large_logits_do_not_overflow() -> None:
    x, matrix = torch.tensor([[[1e4]]], requires_grad=True), torch.tensor([[1.0], [-1.0], [0.0]])
    assert linear_token_loss(x, matrix, torch.tensor([[1]]), None).item() == pytest.approx(2e4)


def _split(backend: str) -> dict[str, Any]:
    """A padded vocabulary over two ranks: the last rows are nobody's labels but count in the softmax, as in the plain loss."""
    mesh = Mesh.create(1, 2, 2, dist.get_rank())
    x, matrix, labels, mask = draw(torch.float64 if backend == "torch" else torch.float32, rows=40)
    want = plain(x, matrix, labels, mask)
    part = matrix.detach().chunk(2)[mesh.tp_rank].clone().requires_grad_()
    assert mesh.tp_group is not None
    seen: nn.Module = CopyToTP(mesh.tp_group)  # what stands in front of the output projection: it sums the ranks' dx
    loss = linear_token_loss(seen(x), part, labels, mask, mesh.tp_group, block=8, backend=backend)
    got = [loss, *torch.autograd.grad(loss * 3, (x, part))]
    want[2] = want[2].chunk(2)[mesh.tp_rank]
    return {"worst": max(relative(a, b) for a, b in zip(got, want, strict=True))}


@pytest.mark.parametrize(("backend", "limit"), [("torch", 1e-12), ("triton", 2e-6)])
def test_split_vocabulary(backend: str, limit: float) -> None:
    for found in run_ranks(_split, 2, backend):
        assert found["worst"] < limit
