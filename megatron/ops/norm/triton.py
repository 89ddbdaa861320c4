"""Norms on a GPU: custom operators that `torch.compile` keeps in its graph. Saved for the backward: the stream and the gain."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from megatron.ops.dispatch import path
from megatron.ops.kernel_arguments import device_guard, fit
from megatron.ops.norm import triton_kernels as kernels
from megatron.ops.norm.operator import add_norm_torch, norm_torch
from megatron.ops.precision import outside_autocast
from megatron.ops.tuning import norm_cut, padded

# Partial sums of weight gradients: about four programs per multiprocessor; a constant, so that sums do not depend on the GPU.
_PARTS = 512


def _constants(d: int, centred: bool, **optional: Any) -> dict[str, Any]:
    rows, warps = norm_cut(d)
    flags = {f"HAS_{name.upper()}": value is not None for name, value in optional.items()}
    return {"BD": padded(d), "ROWS": rows, "CENTRED": centred, **flags, "num_warps": warps}


@torch.library.custom_op("linear_neox::norm_forward", mutates_args=())
def norm_forward(
    x: Tensor,
    added: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    centred: bool,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(y [..., d] in `dtype`, x + added in x's dtype: empty where nothing is added)."""
    x, added = x.contiguous(), None if added is None else added.contiguous()
    d = x.shape[-1]
    n = x.numel() // d
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    total = x.new_empty(0) if added is None else torch.empty_like(x)
    constants = _constants(d, centred, added=added, weight=weight, bias=bias)
    if n:
        with device_guard(x):
            kernels.norm_forward[(triton.cdiv(n, constants["ROWS"]),)](
                x, added, weight, bias, total, y, n, d, eps, **constants
            )  # fmt: skip
    return y, total


@norm_forward.register_fake
def _(x: Any, added: Any, weight: Any, bias: Any, centred: Any, eps: Any, dtype: Any) -> tuple[Tensor, Tensor]:
    shape = x.shape
    return x.new_empty(shape, dtype=dtype), x.new_empty(0) if added is None else x.new_empty(shape)


@torch.library.custom_op("linear_neox::norm_backward", mutates_args=())
def norm_backward(
    dy: Tensor, dtotal: Tensor | None, s: Tensor, weight: Tensor | None, bias: Tensor | None, centred: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum (its dtype), of weight and of bias (empty where there is none)."""
    s, dy, dtotal = s.contiguous(), dy.contiguous(), None if dtotal is None else dtotal.contiguous()
    d = s.shape[-1]
    n = s.numel() // d
    constants = _constants(d, centred, total=dtotal, weight=weight, bias=bias)
    parts = min(_PARTS, triton.cdiv(n, constants["ROWS"]))
    dx = torch.empty_like(s)
    dw, db = (torch.empty(parts if p is not None else 0, d, dtype=torch.float32, device=s.device) for p in (weight, bias))
    if n:
        with device_guard(s):
            kernels.norm_backward[(parts,)](s, weight, dy, dtotal, dx, dw, db, n, d, eps, **constants)
    gradients = [x.sum(0).to(p.dtype) if p is not None else x.new_empty(0) for x, p in ((dw, weight), (db, bias))]
    return dx, gradients[0], gradients[1]


@norm_backward.register_fake
def _(dy: Any, dtotal: Any, s: Any, weight: Any, bias: Any, centred: Any, eps: Any) -> tuple[Tensor, Tensor, Tensor]:
    empty = s.new_empty(0, dtype=torch.float32)
    return s.new_empty(s.shape), *(empty.clone() if p is None else torch.empty_like(p) for p in (weight, bias))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, added, weight, bias, ctx.centred, ctx.eps, _ = inputs
    ctx.added = None if added is None else added.dtype
    ctx.save_for_backward(x if added is None else output[1], weight, bias)
    ctx.set_materialize_grads(False)


@outside_autocast
def _gradient(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> Any:
    s, weight, bias = ctx.saved_tensors
    dy = torch.zeros_like(s) if dy is None else dy
    dx, dw, db = norm_backward(dy, None if ctx.added is None else dtotal, s, weight, bias, ctx.centred, ctx.eps)
    dadded = None if ctx.added is None else dx.to(ctx.added)
    return dx, dadded, None if weight is None else dw, None if bias is None else db, None, None, None


norm_forward.register_autograd(_gradient, setup_context=_setup)


@path("norm", "triton")
def norm_fused(x: Tensor, weight: Tensor | None, bias: Tensor | None, centred: bool, eps: float, dtype: torch.dtype) -> Tensor:
    """Arguments and result as `norm` in `ops/norm/operator.py`; fp64 takes the plain path."""
    if x.dtype == torch.float64:
        return norm_torch(x, weight, bias, centred, eps, dtype)
    d = x.shape[-1]
    return norm_forward(x, None, fit(weight, d, dense=True), fit(bias, d, dense=True), centred, eps, dtype)[0]


@path("norm.add", "triton")
def add_norm_fused(
    x: Tensor, added: Tensor, weight: Tensor | None, bias: Tensor | None, centred: bool, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Arguments and results as `add_norm` in `ops/norm/operator.py`; fp64 takes the plain path."""
    if x.dtype == torch.float64:
        return add_norm_torch(x, added, weight, bias, centred, eps, dtype)
    d = x.shape[-1]
    weight, bias = fit(weight, d, dense=True), fit(bias, d, dense=True)
    y, total = norm_forward(x, fit(added, *x.shape), weight, bias, centred, eps, dtype)
    return total, y
