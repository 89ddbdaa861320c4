"""The fused path of act(a) * b: custom operators that `torch.compile` keeps in its graph. Saved for the backward: a and b."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from megatron.ops.dispatch import path
from megatron.ops.gated import triton_kernels as kernels
from megatron.ops.gated.operator import gated_torch
from megatron.ops.kernel_arguments import device_guard
from megatron.ops.precision import outside_autocast
from megatron.ops.tuning import gated_cut

_FORMS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


def _rows(x: Tensor) -> Tensor:
    """x [..., d] as [n, d] with dense rows; columns of a packed projection are not copied."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def _halves(a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """a and b [..., d]; without b, a contains both."""
    if b is not None:
        return a, b
    first, second = a.chunk(2, -1)
    return first, second


def _launch(n: int, d: int, form: str) -> tuple[tuple[int], dict[str, int]]:
    """Grid and constants."""
    rows, columns, warps = gated_cut(d)
    return (triton.cdiv(n, rows) * triton.cdiv(d, columns),), {
        "ACT": _FORMS[form], "ROWS": rows, "BN": columns, "num_warps": warps
    }  # fmt: skip


@torch.library.custom_op("linear_neox::gated_forward", mutates_args=())
def gated_forward(a: Tensor, b: Tensor | None, form: str) -> Tensor:
    """y [..., d] of a and b [..., d], or of both in a [..., 2 d]."""
    first, second = _halves(a, b)
    y = torch.empty(first.shape, dtype=a.dtype, device=a.device)
    if y.numel():
        first, second = _rows(first), _rows(second)
        n, d = first.shape
        grid, constants = _launch(n, d, form)
        with device_guard(a):
            kernels.gated_forward[grid](first, second, y, n, d, first.stride(0), second.stride(0), **constants)
    return y


@gated_forward.register_fake
def _(a: Any, b: Any, form: Any) -> Tensor:
    return a.new_empty(*a.shape[:-1], a.shape[-1] if b is not None else a.shape[-1] // 2)


@torch.library.custom_op("linear_neox::gated_backward", mutates_args=())
def gated_backward(dy: Tensor, a: Tensor, b: Tensor | None, form: str) -> tuple[Tensor, Tensor]:
    """Gradients of a and b; if a contains both, one tensor [..., 2 d] and an empty one."""
    da = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    db = a.new_empty(0) if b is None else torch.empty(b.shape, dtype=b.dtype, device=b.device)
    if dy.numel():
        ups, (first, second) = _rows(dy), (_rows(x) for x in _halves(a, b))
        dfirst, dsecond = (_rows(x) for x in _halves(da, None if b is None else db))
        (n, d), strides = ups.shape, [x.stride(0) for x in (ups, first, second, dfirst, dsecond)]
        grid, constants = _launch(n, d, form)
        with device_guard(a):
            kernels.gated_backward[grid](ups, first, second, dfirst, dsecond, n, d, *strides, **constants)
    return da, db


@gated_backward.register_fake
def _(dy: Any, a: Any, b: Any, form: Any) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), a.new_empty(0) if b is None else b.new_empty(b.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    a, b, ctx.form = inputs
    ctx.save_for_backward(a, b)


@outside_autocast
def _gradient(ctx: Any, dy: Tensor) -> Any:
    a, b = ctx.saved_tensors
    da, db = gated_backward(dy, a, b, ctx.form)
    return da, None if b is None else db, None


gated_forward.register_autograd(_gradient, setup_context=_setup)


@path("gated", "triton")
def gated_fused(a: Tensor, b: Tensor | None, form: str) -> Tensor:
    """Arguments and result as the plain path in `ops/gated/operator.py`, which also supports fp64 and mixed dtypes."""
    odd = b is None and a.shape[-1] % 2  # the plain path says so
    if a.dtype == torch.float64 or odd or (b is not None and (a.dtype != b.dtype or a.shape != b.shape)):
        return gated_torch(a, b, form)
    return gated_forward(a, b, form)
