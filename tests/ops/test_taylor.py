"""Taylor attention: the packed features, quadratic = chunked = token by token with gradients, memory that grows linearly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import megatron.ops.taylor.operator as op
from megatron.ops.taylor import empty_taylor_state, taylor, taylor_step
from megatron.ops.taylor.features import TaylorMap, feature_count, taylor_features, unpacked_features

TOLERANCE = 1e-10  # fp64; quotients of sums of a few hundred terms of size O(10)


def draw(b: int, s: int, h: int = 2, f: int = 4, v: int = 6, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(b, s, h, f), (b, s, h, f), (b, s, h, v)]
    leaves = [torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    # a state as an earlier text leaves it: its denominators are positive
    k, w = (torch.randn(b, 5, h, n, generator=g, dtype=torch.float64) for n in (f, v))
    _, state = taylor(k, k, w, backend="reference")
    return [*leaves, state.detach().requires_grad_()]


def options(kind: str, b: int, s: int, h: int = 2) -> dict[str, Any]:
    g = torch.Generator().manual_seed(4)
    made: dict[str, Any] = {}
    if "documents" in kind:
        made["segment_ids"] = (torch.rand(b, s, generator=g) < 0.06).cumsum(1)
    if "decay" in kind:
        made["log_decay"] = torch.log1p(-torch.exp2(-3.0 - torch.arange(h, dtype=torch.float64))).expand(1, s, h)
    if "padding" in kind:
        made["keep"] = (torch.rand(b, s, generator=g) < 0.8).double()
    return made


def run(leaves: list[Tensor], backend: str, with_state: bool, **extra: Any) -> list[Tensor]:
    q, k, v, state = leaves
    y, final = taylor(q, k, v, state=state if with_state else None, backend=backend, **extra)
    g = torch.Generator().manual_seed(9)
    total = sum((t * torch.randn(t.shape, generator=g, dtype=torch.float64)).sum() for t in (y, final))
    return [y, final, *torch.autograd.grad(total, leaves if with_state else leaves[:-1])]


def agree(left: list[Tensor], right: list[Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        assert (a - b).abs().max() <= TOLERANCE * max(1.0, float(a.detach().abs().max()))


@pytest.mark.parametrize("f", [1, 2, 3, 7, 8, 16])
def test_packed_features_are_the_polynomial(f: int) -> None:
    g = torch.Generator().manual_seed(f)
    q, k = (torch.randn(5, f, generator=g, dtype=torch.float64) for _ in range(2))
    s = (q * k).sum(-1) / f**0.5
    phi_q, phi_k = (taylor_features(x * f**-0.25) for x in (q, k))
    assert phi_q.shape[-1] == feature_count(f) == 1 + f + f * (f + 1) // 2
    assert ((phi_q * phi_k).sum(-1) - (1 + s + s * s / 2)).abs().max() < 1e-12
    outer = (k[:, :, None] * k[:, None]).flatten(1) / (2**0.5 * f**0.5)
    assert (unpacked_features(phi_k, f) - torch.cat([torch.ones(5, 1), k * f**-0.25, outer], 1)).abs().max() < 1e-12
    assert torch.autograd.gradcheck(TaylorMap.apply, (k.requires_grad_(),))


@pytest.mark.parametrize("s", [1, 15, 128, 129, 300])
@pytest.mark.parametrize("kind", ["plain", "documents", "decay", "padding", "documents decay padding"])
@pytest.mark.parametrize("with_state", [False, True])
def test_chunked_equals_quadratic(s: int, kind: str, with_state: bool) -> None:
    leaves = draw(3, s)
    extra = options(kind, 3, s)
    agree(run(leaves, "reference", with_state, **extra), run(leaves, "torch", with_state, **extra))


def test_sums_without_division() -> None:
    leaves = draw(2, 150)
    agree(run(leaves, "reference", True, divide=False), run(leaves, "torch", True, divide=False))


@pytest.mark.parametrize(("b", "s"), [(9, 40), (2, 300)])
def test_row_groups_and_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch, b: int, s: int) -> None:
    leaves = draw(b, s)
    extra = options("documents", b, s)
    whole = run(leaves, "torch", True, **extra)
    monkeypatch.setattr(op, "TAYLOR_CHUNK", 32)
    monkeypatch.setattr(op, "_ROWS", 64)
    agree(whole, run(leaves, "torch", True, **extra))


@pytest.mark.parametrize("kind", ["plain", "decay"])
def test_steps_equal_the_pass_from_its_start_and_after_a_prefill(kind: str) -> None:
    q, k, v, _ = (t.detach() for t in draw(2, 40))
    extra = options(kind, 2, 40)
    rate = extra["log_decay"][0, 0] if extra else None
    whole, final = taylor(q, k, v, **extra)
    for start in (0, 23):
        cut = {name: t[:, :start] for name, t in extra.items()}
        state = empty_taylor_state(2, 2, 4, 6, q.dtype, "cpu")
        if start:
            _, state = taylor(q[:, :start], k[:, :start], v[:, :start], **cut)
        for t in range(start, 40):
            y, state = taylor_step(q[:, t], k[:, t], v[:, t], state, rate)
            assert (y - whole[:, t]).abs().max() <= TOLERANCE
        assert (state - final).abs().max() <= TOLERANCE


def test_rows_without_any_token_are_zero_not_nan() -> None:
    q, k, v, _ = draw(2, 10)
    keep = torch.ones(2, 10, dtype=torch.float64)
    keep[1] = 0
    y, final = taylor(q, k, v, keep=keep)
    assert y[1].abs().max() == 0 and final[1].abs().max() == 0
    (grad,) = torch.autograd.grad(y.sum(), v)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_keep_fp32_inside(dtype: torch.dtype) -> None:
    """Only inputs and output are rounded: the output's relative error stays near one rounding of the dtype."""
    leaves = draw(2, 200, f=16, v=32, dtype=dtype)
    exact = [t.detach().double() for t in leaves]
    y, final = taylor(*leaves[:3], state=leaves[3].float())
    want, want_final = taylor(*exact[:3], state=exact[3], backend="reference")
    assert y.dtype == dtype and final.dtype == torch.float32
    assert (y.double() - want).norm() / want.norm() < {torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]
    assert (final.double() - want_final).norm() / want_final.norm() < 1e-5
    grads = torch.autograd.grad(y.float().pow(2).sum(), leaves[:3])
    inputs = [t.requires_grad_() for t in exact[:3]]
    wants = torch.autograd.grad(taylor(*inputs, state=exact[3], backend="reference")[0].pow(2).sum(), inputs)
    for got, expected in zip(grads, wants, strict=True):
        assert (got.double() - expected).norm() / expected.norm() < {torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
