"""The fused MetaLA operator on a GPU, as custom operators that `torch.compile` keeps in its graph.

Only the inputs are kept for the backward; everything else is computed again, which costs less than reading it back. States are
stored in the compute dtype at chunk boundaries and carried in fp32 in between. Inputs may be views of one packed projection: a
token's row may lie anywhere, heads and channels must be dense (`metala_packed_triton.py` takes the projection itself).

With `TRITON_INTERPRET=1` set before Triton is imported the same code runs on a CPU, slowly: so it is tested without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.ops import metala_launch as launch
from megatron.ops.dispatch import path
from megatron.ops.precision import outside_autocast


@torch.library.custom_op("linear_neox::metala_forward", mutates_args=())
def metala_forward(
    q: Tensor,
    z: Tensor,
    v: Tensor,
    g: Tensor,
    w: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    segment_ids: Tensor | None,
    gate_round: int,
) -> tuple[Tensor, Tensor]:
    """y [b, t, h, v] and the last state [b, h, k, v] in fp32; arguments as in `ops/metala.py`."""
    return launch.forward(launch.Inputs.of((q, z, v, g), w, mask, segment_ids, gate_round), state)


@metala_forward.register_fake
def _(
    q: Any, z: Any, v: Any, g: Any, w: Any, state: Any, mask: Any, segment_ids: Any, gate_round: Any
) -> tuple[Tensor, Tensor]:
    b, _, h, k = q.shape
    return torch.empty(v.shape, dtype=v.dtype, device=v.device), q.new_empty(b, h, k, v.shape[-1], dtype=torch.float32)


@torch.library.custom_op("linear_neox::metala_backward", mutates_args=())
def metala_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    z: Tensor,
    v: Tensor,
    g: Tensor,
    w: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    segment_ids: Tensor | None,
    gate_round: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, z, v, g (dense, in their dtypes), w (its dtype) and the initial state (fp32)."""
    x = launch.Inputs.of((q, z, v, g), w, mask, segment_ids, gate_round)
    dq, dz, dv, dg = (torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in (q, z, v, g))
    dw, dstate = launch.backward(x, dy, dfinal, state, (dq, dz, dv, dg))
    return dq, dz, dv, dg, dw, dstate


@metala_backward.register_fake
def _(dy: Any, dfinal: Any, q: Any, z: Any, v: Any, g: Any, w: Any, state: Any, mask: Any, ids: Any, gate_round: Any) -> Any:
    b, _, h, k = q.shape
    like = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, z, v, g, w)]
    return (*like, q.new_empty(b, h, k, v.shape[-1], dtype=torch.float32))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.gate_round = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)  # a final state that nobody uses has no gradient: no zeros are written and read


@outside_autocast
def _gradient(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> Any:
    saved = ctx.saved_tensors
    dy = torch.zeros_like(saved[2], memory_format=torch.contiguous_format) if dy is None else dy
    dq, dz, dv, dg, dw, dstate = metala_backward(dy, dfinal, *saved, ctx.gate_round)
    return dq, dz, dv, dg, dw, dstate if saved[5] is not None else None, None, None, None


metala_forward.register_autograd(_gradient, setup_context=_setup)


def plain(mask: Tensor | None, segment_ids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Mask and document numbers in the formats that the kernels read."""
    return (
        None if mask is None else mask.to(torch.int8).contiguous(),
        None if segment_ids is None else segment_ids.to(torch.int32).contiguous(),
    )


@path("metala", "triton")
def metala_fused(
    q: Tensor,
    z: Tensor,
    v: Tensor,
    g: Tensor,
    w: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    segment_ids: Tensor | None,
    gate_round: str,
) -> tuple[Tensor, Tensor]:
    """The fused path; arguments and results as `metala` in `ops/metala.py`."""
    return metala_forward(q, z, v, g, w, state, *plain(mask, segment_ids), launch.ROUND[gate_round])
