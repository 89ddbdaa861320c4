"""The fused MetaLA operator over one packed projection q | z | v | g, with one packed gradient back.

A layer then has one matrix product in front of the operator, one for the gradient of its input (with no sums of four parts) and
one for the gradient of its weights. The kernels are those of `ops/metala_triton.py`: they read and write through strides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.ops import metala_launch as launch
from megatron.ops.dispatch import path
from megatron.ops.metala_triton import plain
from megatron.ops.packed import cut_packed
from megatron.ops.precision import outside_autocast


@torch.library.custom_op("linear_neox::metala_packed_forward", mutates_args=())
def metala_packed_forward(
    packed: Tensor, w: Tensor, state: Tensor | None, mask: Tensor | None, segment_ids: Tensor | None, gate_round: int
) -> tuple[Tensor, Tensor]:
    """packed [b, t, h (2k + 2v)] = q | z | v | g; w [h, k] -> y [b, t, h, v] and the last state, as `metala_forward`."""
    return launch.forward(launch.Inputs.of(cut_packed(packed, w), w, mask, segment_ids, gate_round), state)


@metala_packed_forward.register_fake
def _(packed: Any, w: Any, state: Any, mask: Any, segment_ids: Any, gate_round: Any) -> tuple[Tensor, Tensor]:
    v = cut_packed(packed, w)[2]
    b, _, h, width = v.shape
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    return y, packed.new_empty(b, h, w.shape[1], width, dtype=torch.float32)


@torch.library.custom_op("linear_neox::metala_packed_backward", mutates_args=())
def metala_packed_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    packed: Tensor,
    w: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    segment_ids: Tensor | None,
    gate_round: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the packed projection (one dense tensor), of w and of the initial state (fp32)."""
    x = launch.Inputs.of(cut_packed(packed, w), w, mask, segment_ids, gate_round)
    dpacked = torch.empty(packed.shape, dtype=packed.dtype, device=packed.device)
    dw, dstate = launch.backward(x, dy, dfinal, state, cut_packed(dpacked, w))
    return dpacked, dw, dstate


@metala_packed_backward.register_fake
def _(dy: Any, dfinal: Any, packed: Any, w: Any, state: Any, mask: Any, segment_ids: Any, gate_round: Any) -> Any:
    v = cut_packed(packed, w)[2]
    like = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (packed, w)]
    return (*like, packed.new_empty(v.shape[0], v.shape[2], w.shape[1], v.shape[3], dtype=torch.float32))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.gate_round = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)  # a final state that nobody uses has no gradient: no zeros are written and read


@outside_autocast
def _gradient(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> Any:
    saved = ctx.saved_tensors
    dy = torch.zeros_like(cut_packed(saved[0], saved[1])[2], memory_format=torch.contiguous_format) if dy is None else dy
    dpacked, dw, dstate = metala_packed_backward(dy, dfinal, *saved, ctx.gate_round)
    return dpacked, dw, dstate if saved[2] is not None else None, None, None, None


metala_packed_forward.register_autograd(_gradient, setup_context=_setup)


@path("metala_packed", "triton")
def metala_packed_fused(
    packed: Tensor, w: Tensor, state: Tensor | None, mask: Tensor | None, segment_ids: Tensor | None, gate_round: str
) -> tuple[Tensor, Tensor]:
    """The fused path over a packed projection; arguments and results as `metala_packed` in `ops/metala_packed.py`."""
    return metala_packed_forward(packed, w, state, *plain(mask, segment_ids), launch.ROUND[gate_round])
