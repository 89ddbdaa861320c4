"""Short causal depthwise convolution along the sequence, with history and document boundaries.

    y_t = act( bias + sum_j W[:, j] * x_{t - (w-1) + j} )      tap w-1 is the current token

Zero history before the first token unless `history` is given; the convolution does not cross document boundaries. The
plain form is a sum of shifted products: on a CPU it is faster than a grouped `conv1d`, which needs the channels outermost. x
and the weights may have different dtypes (autocast casts x to bf16 and leaves the weights in fp32): products and sums use the
wider one, y and the gradient of x have the dtype of x.
Shapes: x [b, s, d], weight [d, 1, w] (the layout of `nn.Conv1d(groups=d)`), history [b, w-1, d].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops.dispatch import choose, path
from megatron.ops.precision import outside_autocast


def reach(segment_ids: Tensor, s: int, width: int, shift: int, dtype: torch.dtype) -> Tensor:
    """[b, s, 1] factor: 1 where the token `shift` places back belongs to the same document (history: to the first one)."""
    padded = torch.cat([segment_ids[:, :1].expand(-1, width - 1), segment_ids], dim=1)
    return (padded[:, width - 1 - shift : width - 1 - shift + s] == segment_ids).to(dtype).unsqueeze(-1)


@path("conv", "reference")
def conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, history: Tensor | None, segment_ids: Tensor | None
) -> Tensor:
    """The formula above, tap by tap, differentiable by autograd."""
    s, width = x.shape[1], weight.shape[-1]
    past = x.new_zeros(x.shape[0], width - 1, x.shape[2]) if history is None else history.to(x.dtype)
    padded = torch.cat([past, x], dim=1)
    total = torch.zeros_like(x) if bias is None else bias.expand_as(x)
    for tap in range(width):
        part = padded[:, tap : tap + s] * weight[:, 0, tap]
        shift = width - 1 - tap
        if segment_ids is not None and shift:
            part = part * reach(segment_ids, s, width, shift, x.dtype)
        total = total + part
    return (F.silu(total) if activation == "silu" else total).to(x.dtype)


@outside_autocast
class _ShortConv(torch.autograd.Function):
    """Without bias and document boundaries, as in training. Saves x and the sum before the activation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, history: Tensor | None, silu: bool) -> Tensor:
        s = x.shape[1]
        width = weight.shape[-1]
        taps = weight[:, 0].t().contiguous()
        total = x * taps[-1]
        for shift in range(1, min(width, s)):
            total[:, shift:].addcmul_(x[:, :-shift], taps[width - 1 - shift])
        if history is not None:
            for shift in range(1, width):
                n = min(shift, s)
                total[:, :n].addcmul_(history[:, width - 1 - shift : width - 1 - shift + n], taps[width - 1 - shift])
        ctx.save_for_backward(x, weight, history, total)
        ctx.silu = silu
        if silu:
            return F.silu(total).to(x.dtype)
        return total.to(x.dtype, copy=ctx.needs_input_grad[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, history, total = ctx.saved_tensors
        s, width = x.shape[1], weight.shape[-1]
        taps = weight[:, 0].t().contiguous()
        dt = torch.ops.aten.silu_backward(dy.contiguous().to(total.dtype), total) if ctx.silu else dy
        dx = dt * taps[-1]
        dw = torch.zeros_like(taps)
        dw[-1] = (dt * x).sum((0, 1))
        for shift in range(1, min(width, s)):
            tap = width - 1 - shift
            dx[:, :-shift].addcmul_(dt[:, shift:], taps[tap])
            dw[tap] = (dt[:, shift:] * x[:, :-shift]).sum((0, 1))
        dh = None
        if history is not None:
            dh = torch.zeros_like(history)
            for shift in range(1, width):
                n, tap = min(shift, s), width - 1 - shift
                dh[:, tap : tap + n].addcmul_(dt[:, :n], taps[tap])
                dw[tap] += (dt[:, :n] * history[:, tap : tap + n]).sum((0, 1))
        return dx.to(x.dtype), dw.t().unsqueeze(1), dh, None


@path("conv", "torch")
def conv_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, history: Tensor | None, segment_ids: Tensor | None
) -> Tensor:
    """Hand-written backward without bias and boundaries; with them, and under the compiler, which fuses it, the plain form."""
    if bias is not None or segment_ids is not None or torch.compiler.is_compiling():
        return conv_reference(x, weight, bias, activation, history, segment_ids)
    return _ShortConv.apply(x, weight, None if history is None else history.to(x.dtype), activation == "silu")


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    history: Tensor | None = None,
    segment_ids: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`y [b, s, d]`; see the docstring of this module. `activation` is "silu" or None."""
    return choose("conv", backend, x.device)(x, weight, bias, activation, history, segment_ids)


@path("conv.step", "reference")
@path("conv.step", "torch")
def conv_step_torch(
    x: Tensor,
    weight: Tensor,
    state: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    slots: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """The plain form of `conv_step_`."""
    old = state if slots is None else state[slots]
    window = torch.cat([old.to(x.dtype), x.unsqueeze(1)], dim=1)
    total = (window * weight[:, 0].t()).sum(1)
    total = total if bias is None else total + bias
    shifted = window[:, 1:].to(state.dtype)
    if slots is None:
        state.copy_(shifted)
    else:
        state[slots] = shifted
    y = (F.silu(total) if activation == "silu" else total).to(x.dtype)
    return y if gate is None else y * gate


def conv_step_(
    x: Tensor,
    weight: Tensor,
    state: Tensor,
    bias: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    slots: Tensor | None = None,
    activation: str | None = "silu",
    backend: str = "auto",
) -> Tensor:
    """One token per row: x [b, d] -> y [b, d]; `state [slots, w - 1, d]`, the window of the last inputs, is shifted in place.

    gate: [b, d], a factor of y after the activation. slots: [b], the row of `state` for each batch row; None: row i for row i.
    """
    return choose("conv.step", backend, x.device)(x, weight, state, bias, gate, slots, activation)


def next_history(
    x: Tensor, history: Tensor | None, width: int, mask: Tensor | None = None, segment_ids: Tensor | None = None
) -> Tensor:
    """The last `width - 1` real inputs `[b, width-1, d]`, which are the history of the token that follows.

    With a mask [b, s] the window ends at each row's last real token, so that padding on either side does not matter. With
    segment_ids [b, s] inputs of earlier documents are 0: the token that follows belongs to the document of that last token.
    """
    b, s, d = x.shape
    past = x.new_zeros(b, width - 1, d) if history is None else history.to(x.dtype)
    padded = torch.cat([past, x], dim=1)
    if mask is None and segment_ids is None:
        return padded[:, s:].clone()
    place = torch.arange(1, s + 1, device=x.device)
    # 0 when a row has no token at all: the old window stays
    ends = torch.full((b,), s, device=x.device) if mask is None else (mask.bool() * place).amax(dim=1)
    index = ends[:, None] + torch.arange(width - 1, device=x.device)
    window = padded.gather(1, index[..., None].expand(-1, -1, d))
    if segment_ids is None:
        return window
    owners = torch.cat([segment_ids[:, :1].expand(-1, width - 1), segment_ids], dim=1)
    last = owners.gather(1, ends[:, None] + width - 2) if width > 1 else owners[:, :1]
    return window * (owners.gather(1, index) == last).unsqueeze(-1).to(x.dtype)
