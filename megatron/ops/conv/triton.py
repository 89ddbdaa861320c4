"""The short convolution on a GPU: custom operators that `torch.compile` keeps in its graph."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from megatron.ops.conv import triton_kernels as kernels
from megatron.ops.conv.operator import conv_reference, conv_step_torch, conv_torch, reach
from megatron.ops.dispatch import path
from megatron.ops.kernel_arguments import check_in_place, device_guard, fit, token_rows, token_stride
from megatron.ops.precision import outside_autocast
from megatron.ops.tuning import padded

_TOKENS, _CHANNELS, _WARPS = 32, 32, 4
ROWS, UNROLLED = 61, 4
"""Largest number of rows of a program of the backward, which reads three more; how many of them are one step of its loop."""
TAPS = 4
"""Largest kernel size of the fused backward; wider convolutions, which no released model has, use the plain gradient."""


def tile_rows(t: int) -> int:
    """Rows per program of the backward for `t` tokens: 61, 29 or 13, as a program walks over all its rows."""
    return min(ROWS, padded(t + 3) - 3)


def row_channels(d: int) -> int:
    """Channels per program of the backward: eight for each thread of one warp, fewer where there are fewer."""
    return min(256, padded(d))


def taps_of(weight: Tensor, taps: int) -> Tensor:
    """weight [d, 1, w] tap by tap, [taps, d] dense, zeros in front."""
    return F.pad(weight[:, 0].t(), (0, 0, taps - weight.shape[-1], 0)).contiguous()


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else token_stride(x)


def _grid(x: Tensor) -> tuple[int, int]:
    b, t, d = x.shape
    return b * triton.cdiv(t, _TOKENS), triton.cdiv(d, _CHANNELS)


def _constants(weight: Tensor, silu: bool, bias: Any, gate: Any, history: Any, segment_ids: Any) -> dict[str, Any]:
    optional = {"HAS_BIAS": bias, "HAS_GATE": gate, "HAS_HIST": history, "HAS_SEG": segment_ids}
    fixed = {"W": weight.shape[-1], "BT": _TOKENS, "BD": _CHANNELS, "SILU": silu, "num_warps": _WARPS}
    return fixed | {name: value is not None for name, value in optional.items()}


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
    """y [b, t, d] = act(conv(x)) [* gate]; weight [d, 1, w], history [b, w-1, d]; arguments as in `ops/conv/operator.py`."""
    x, gate = token_rows(x), None if gate is None else token_rows(gate)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        with device_guard(x):
            kernels.conv_forward[_grid(x)](
                x, taps_of(weight, weight.shape[-1]), bias, gate, history, segment_ids, y,
                x.shape[1], x.shape[2], _stride(x), _stride(gate),
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
    w = weight.shape[-1]
    if w > TAPS:
        return _plain_gradients(dy, x, weight, bias, gate, history, segment_ids, silu)
    x, dy, gate = token_rows(x), token_rows(dy), None if gate is None else token_rows(gate)
    b, t, d = x.shape
    rows, block = tile_rows(t), row_channels(d)
    tiles = triton.cdiv(t, rows)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dw = torch.empty(b, tiles, TAPS, d, dtype=torch.float32, device=x.device)
    db = torch.empty(b, tiles, d, dtype=torch.float32, device=x.device) if bias is not None else dw.new_empty(0)
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=x.device) if gate is not None else dw.new_empty(0)
    if x.numel():
        constants = _constants(weight, silu, bias, gate, history, segment_ids)
        constants |= {"BT": rows, "BD": block, "U": UNROLLED, "num_warps": 1}
        with device_guard(x):
            kernels.conv_backward[(b * tiles, triton.cdiv(d, block))](
                x, taps_of(weight, TAPS), bias, gate, history, segment_ids, dy, dx, dw, db, dgate,
                t, d, _stride(x), _stride(gate), _stride(dy), **constants,
            )  # fmt: skip
    dweight = dw.sum((0, 1))[TAPS - w :].t().unsqueeze(1).to(weight.dtype)
    return dx, dweight, db.sum((0, 1)).to(weight.dtype) if bias is not None else db, dgate


def _plain_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Any, gate: Any, history: Any, segment_ids: Any, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`conv_backward` tap by tap in torch; below a custom operator there is no autograd."""
    (b, s, d), width = x.shape, weight.shape[-1]
    past = x.new_zeros(b, width - 1, d) if history is None else history
    padded_x, taps = torch.cat([past, x], 1).float(), weight[:, 0].float()
    total = conv_reference(x.float(), weight.float(), bias, None, past.float(), segment_ids)
    sig, up = torch.sigmoid(total), dy.float()
    dgate = x.new_empty(0) if gate is None else (up * (total * sig if silu else total)).to(gate.dtype)
    up = up if gate is None else up * gate
    dz = up * sig * (1 + total * (1 - sig)) if silu else up
    dx, dw = torch.zeros_like(padded_x), torch.empty_like(taps)
    for tap in range(width):
        shift = width - 1 - tap
        part = dz if segment_ids is None or not shift else dz * reach(segment_ids, s, width, shift, dz.dtype)
        dw[:, tap] = (part * padded_x[:, tap : tap + s]).sum((0, 1))
        dx[:, tap : tap + s] += part * taps[:, tap]
    dbias = x.new_empty(0) if bias is None else dz.sum((0, 1)).to(weight.dtype)
    return dx[:, width - 1 :].to(x.dtype).contiguous(), dw.unsqueeze(1).to(weight.dtype), dbias, dgate


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
    """The fused path; arguments as `causal_conv` in `ops/conv/operator.py`. fp64 takes the plain path."""
    if x.dtype == torch.float64:
        return conv_torch(x, weight, bias, activation, history, segment_ids)
    (b, t, d), w = x.shape, weight.shape[-1]
    history = fit(history, b, w - 1, d, dense=True, dtype=x.dtype)
    segment_ids = fit(segment_ids, b, t, dense=True, dtype=torch.int32)
    weight, bias = fit(weight, d, 1, w), fit(bias, d, dense=True)
    return conv_forward(x, weight, bias, None, history, segment_ids, activation == "silu")


@path("conv.step", "triton")
def conv_step_in_place(
    x: Tensor,
    weight: Tensor,
    state: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    slots: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """One token per row; the window of the last inputs is shifted in place.

    Args:
        x: [b, d].
        weight: [d, 1, w].
        state: the last w - 1 inputs, [slots, w - 1, d], each row dense, in x's dtype.
        bias: [d] or None.
        gate: [b, d] or None: a factor of y after the activation.
        slots: int [b], the row of `state` that belongs to each batch row; None means row i for row i.
        activation: `silu` or None.

    Returns:
        y [b, d].

    Raises:
        ValueError: `state` or `slots` do not fit.
    """
    if x.dtype == torch.float64:
        return conv_step_torch(x, weight, state, bias, gate, slots, activation)
    b, d = x.shape
    check_in_place(state, (weight.shape[-1] - 1, d), x.dtype, x, slots)
    x = x if x.stride(1) == 1 else x.contiguous()
    gate = gate if gate is None or gate.stride(1) == 1 else gate.contiguous()
    weight, bias = fit(weight, d, 1, weight.shape[-1]), fit(bias, d, dense=True)
    y = torch.empty(b, d, dtype=x.dtype, device=x.device)
    if y.numel():
        with device_guard(x):
            kernels.conv_step[(b, triton.cdiv(d, 256))](
                x, taps_of(weight, weight.shape[-1]), bias, gate, state, slots, y,
                d, x.stride(0), 0 if gate is None else gate.stride(0), state.stride(0),
                W=weight.shape[-1], BD=256, SILU=activation == "silu", HAS_BIAS=bias is not None, HAS_GATE=gate is not None,
                HAS_SLOTS=slots is not None, num_warps=4,
            )  # fmt: skip
    return y
