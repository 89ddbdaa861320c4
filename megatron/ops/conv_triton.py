"""The short convolution on a GPU: launches `conv_kernels.py` as custom operators that `torch.compile` keeps in its graph."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from megatron.ops import conv_kernels as kernels
from megatron.ops.conv import conv_reference
from megatron.ops.dispatch import path
from megatron.ops.kernel_arguments import check_in_place, device_guard, token_rows, token_stride
from megatron.ops.precision import outside_autocast

_TOKENS, _CHANNELS, _WARPS = 32, 32, 4  # larger tiles spill in the backward, which holds w x w shifted rows


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else token_stride(x)


def _grid(x: Tensor) -> tuple[int, int]:
    b, t, d = x.shape
    return b * triton.cdiv(t, _TOKENS), triton.cdiv(d, _CHANNELS)


def _constants(weight: Tensor, silu: bool, bias: Any, gate: Any, history: Any, segment_ids: Any) -> dict[str, Any]:
    have = {"HAS_BIAS": bias, "HAS_GATE": gate, "HAS_HIST": history, "HAS_SEG": segment_ids}
    fixed = {"W": weight.shape[-1], "BT": _TOKENS, "BD": _CHANNELS, "SILU": silu, "num_warps": _WARPS}
    return fixed | {name: value is not None for name, value in have.items()}


@torch.library.custom_op("linear_neox::conv_forward", mutates_args=())
def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    history: Tensor | None,
    segment_ids: Tensor | None,
    silu: bool,
) -> Tensor:
    """y [b, t, d] = act(conv(x)) [* gate]; weight [d, 1, w], history [b, w-1, d]; arguments as in `ops/conv.py`."""
    x, gate = token_rows(x), None if gate is None else token_rows(gate)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        with device_guard(x):
            kernels.conv_forward[_grid(x)](
                x, weight.contiguous(), bias, gate, history, segment_ids, y, x.shape[1], x.shape[2], _stride(x), _stride(gate),
                **_constants(weight, silu, bias, gate, history, segment_ids),
            )  # fmt: skip
    return y


@conv_forward.register_fake
def _(x: Any, weight: Any, bias: Any, gate: Any, history: Any, segment_ids: Any, silu: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("linear_neox::conv_backward", mutates_args=())
def conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    history: Tensor | None,
    segment_ids: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias (empty without one) and gate (empty without one)."""
    x, dy, gate = token_rows(x), token_rows(dy), None if gate is None else token_rows(gate)
    (b, t, d), w = x.shape, weight.shape[-1]
    tiles = triton.cdiv(t, _TOKENS)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dw = torch.empty(b, tiles, w, d, dtype=torch.float32, device=x.device)
    db = torch.empty(b, tiles, d, dtype=torch.float32, device=x.device) if bias is not None else dw.new_empty(0)
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=x.device) if gate is not None else dw.new_empty(0)
    if x.numel():
        with device_guard(x):
            kernels.conv_backward[_grid(x)](
                x, weight.contiguous(), bias, gate, history, segment_ids, dy, dx, dw, db, dgate,
                t, d, _stride(x), _stride(gate), _stride(dy),
                **_constants(weight, silu, bias, gate, history, segment_ids),
            )  # fmt: skip
    # parts are by shift, weights by tap: tap w-1 is the current token
    dweight = dw.sum((0, 1)).flip(0).t().unsqueeze(1).to(weight.dtype)
    return dx, dweight, db.sum((0, 1)).to(weight.dtype) if bias is not None else db, dgate


@conv_backward.register_fake
def _(dy: Any, x: Any, weight: Any, bias: Any, gate: Any, history: Any, segment_ids: Any, silu: Any) -> Any:
    like = [torch.empty(t.shape, dtype=t.dtype, device=x.device) for t in (x, weight)]
    return (
        *like,
        x.new_empty(0) if bias is None else torch.empty_like(bias),
        x.new_empty(0) if gate is None else torch.empty_like(gate),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


@outside_autocast
def _gradient(ctx: Any, dy: Tensor) -> Any:
    x, weight, bias, gate, history, segment_ids = ctx.saved_tensors
    dx, dweight, db, dgate = conv_backward(dy, x, weight, bias, gate, history, segment_ids, ctx.silu)
    dhistory = None
    if history is not None and ctx.needs_input_grad[4]:
        dhistory = _history_gradient(dy, x, weight, bias, gate, history, segment_ids, ctx.silu)
    return dx, dweight, None if bias is None else db, None if gate is None else dgate, dhistory, None, None


def _history_gradient(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Any, gate: Any, history: Tensor, segment_ids: Any, silu: bool
) -> Tensor:
    """Only the first w - 1 tokens see the history: the plain form on those is enough."""
    n = min(history.shape[1], x.shape[1])
    ids = None if segment_ids is None else segment_ids[:, :n]
    with torch.enable_grad():
        past = history.detach().requires_grad_()
        y = conv_reference(x[:, :n].detach(), weight.detach(), bias, "silu" if silu else None, past, ids)
        y = y if gate is None else y * gate[:, :n]
        return torch.autograd.grad(y, past, dy[:, :n])[0]


conv_forward.register_autograd(_gradient, setup_context=_setup)


@path("conv", "triton")
def conv_fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, history: Tensor | None, segment_ids: Tensor | None
) -> Tensor:
    """The fused path; arguments as `causal_conv` in `ops/conv.py`."""
    history = None if history is None else history.to(x.dtype).contiguous()
    segment_ids = None if segment_ids is None else segment_ids.to(torch.int32).contiguous()
    return conv_forward(x, weight, bias, None, history, segment_ids, activation == "silu")


def conv_step_in_place(
    x: Tensor,
    weight: Tensor,
    state: Tensor,
    bias: Tensor | None = None,
    slots: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """One token per row; the window takes it in and drops its oldest, in place.

    Args:
        x: [b, d].
        weight: [d, 1, w].
        state: the last w - 1 inputs, [slots, w - 1, d], dense, in x's dtype.
        bias: [d] or None.
        slots: int [b], the row of `state` that belongs to each batch row; None means row i of i.
        activation: `silu` or None.

    Returns:
        y [b, d].

    Raises:
        ValueError: `state` or `slots` do not fit.
    """
    b, d = x.shape
    check_in_place(state, (weight.shape[-1] - 1, d), x.dtype, x, slots)
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(b, d, dtype=x.dtype, device=x.device)
    if y.numel():
        with device_guard(x):
            kernels.conv_step[(b, triton.cdiv(d, 256))](
                x, weight.contiguous(), bias, state, slots, y, d, x.stride(0),
                W=weight.shape[-1], BD=256, SILU=activation == "silu", HAS_BIAS=bias is not None, HAS_SLOTS=slots is not None,
                num_warps=4,
            )  # fmt: skip
    return y
