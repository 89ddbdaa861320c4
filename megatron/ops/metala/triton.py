"""The fused MetaLA operator on a GPU: custom operators that `torch.compile` keeps in its graph, and the decode step in place.

For the backward the inputs are kept and the rows as they leave the norm: to form these again would take most of a forward. All
else is computed again, which costs less than reading it back. States are stored in the compute dtype at chunk boundaries and
carried in fp32 in between. Inputs may be views of one packed projection: a token's row may lie anywhere, heads and channels
must be dense. The operator over the packed projection itself has one packed gradient: a layer then has one matrix product in
front of it, one for the gradient of its input (with no sums of four parts) and one for the gradient of its weights.

With `TRITON_INTERPRET=1` set before Triton is imported the same code runs on a CPU, slowly: so it is tested without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.ops.dispatch import path
from megatron.ops.kernel_arguments import check_in_place, check_interpreted, device_guard, fit, head_rows
from megatron.ops.metala import triton_launch as launch
from megatron.ops.metala import triton_step_kernels as step_kernels
from megatron.ops.metala.inputs import MetaLAInputs, cut_packed
from megatron.ops.metala.operator import metala_torch
from megatron.ops.metala.step import metala_step_torch
from megatron.ops.precision import outside_autocast
from megatron.ops.tuning import metala_fits, padded


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
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [b, t, h, v], the last state [b, h, k, v] in fp32, and where `keep` is set what the backward reads (`launch.Kept`)."""
    y, final, kept = launch.forward(launch.Inputs.of((q, z, v, g), w, mask, segment_ids, gate_round), state, keep)
    return y, final, *kept


@metala_forward.register_fake
def _(
    q: Any, z: Any, v: Any, g: Any, w: Any, state: Any, mask: Any, segment_ids: Any, gate_round: Any, keep: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, _, h, k = q.shape
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    return y, q.new_empty(b, h, k, v.shape[-1], dtype=torch.float32), *launch.empty_kept(v, keep)


@torch.library.custom_op("linear_neox::metala_backward", mutates_args=())
def metala_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    normed: Tensor,
    inverse: Tensor,
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
    dw, dstate = launch.backward(x, dy, dfinal, state, launch.Kept(normed, inverse), (dq, dz, dv, dg))
    return dq, dz, dv, dg, dw, dstate


@metala_backward.register_fake
def _(
    dy: Any, dfinal: Any, normed: Any, inverse: Any, q: Any, z: Any, v: Any, g: Any, w: Any, state: Any, mask: Any, ids: Any,
    gate_round: Any,
) -> Any:  # fmt: skip
    b, _, h, k = q.shape
    like = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, z, v, g, w)]
    return (*like, q.new_empty(b, h, k, v.shape[-1], dtype=torch.float32))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.gate_round, keep = inputs
    ctx.save_for_backward(*output[2:], *tensors)
    ctx.set_materialize_grads(False)  # a final state that nobody uses has no gradient: no zeros are written and read
    if not keep:
        raise RuntimeError("the fused MetaLA operator was called without `keep`, and has no backward")


@outside_autocast
def _gradient(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, *_: Any) -> Any:
    saved = ctx.saved_tensors
    dy = torch.zeros_like(saved[0]) if dy is None else dy
    dq, dz, dv, dg, dw, dstate = metala_backward(dy, dfinal, *saved, ctx.gate_round)
    return dq, dz, dv, dg, dw, dstate if saved[7] is not None else None, None, None, None, None


metala_forward.register_autograd(_gradient, setup_context=_setup)


@torch.library.custom_op("linear_neox::metala_packed_forward", mutates_args=())
def metala_packed_forward(
    packed: Tensor,
    w: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    segment_ids: Tensor | None,
    gate_round: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """packed [b, t, h (2k + 2v)] = q | z | v | g and w [h, k] -> as `metala_forward`."""
    y, final, kept = launch.forward(launch.Inputs.of(cut_packed(packed, w), w, mask, segment_ids, gate_round), state, keep)
    return y, final, *kept


@metala_packed_forward.register_fake
def _(
    packed: Any, w: Any, state: Any, mask: Any, segment_ids: Any, gate_round: Any, keep: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    v = cut_packed(packed, w)[2]
    b, _, h, width = v.shape
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    return y, packed.new_empty(b, h, w.shape[1], width, dtype=torch.float32), *launch.empty_kept(v, keep)


@torch.library.custom_op("linear_neox::metala_packed_backward", mutates_args=())
def metala_packed_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    normed: Tensor,
    inverse: Tensor,
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
    dw, dstate = launch.backward(x, dy, dfinal, state, launch.Kept(normed, inverse), cut_packed(dpacked, w))
    return dpacked, dw, dstate


@metala_packed_backward.register_fake
def _(
    dy: Any, dfinal: Any, normed: Any, inverse: Any, packed: Any, w: Any, state: Any, mask: Any, ids: Any, gate_round: Any
) -> Any:
    v = cut_packed(packed, w)[2]
    like = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (packed, w)]
    return (*like, packed.new_empty(v.shape[0], v.shape[2], w.shape[1], v.shape[3], dtype=torch.float32))


@outside_autocast
def _gradient_packed(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, *_: Any) -> Any:
    saved = ctx.saved_tensors
    dy = torch.zeros_like(saved[0]) if dy is None else dy
    dpacked, dw, dstate = metala_packed_backward(dy, dfinal, *saved, ctx.gate_round)
    return dpacked, dw, dstate if saved[4] is not None else None, None, None, None, None


metala_packed_forward.register_autograd(_gradient_packed, setup_context=_setup)


@path("metala", "triton")
def metala_fused(x: MetaLAInputs) -> tuple[Tensor, Tensor]:
    """The fused path, over the packed projection where there is one; fp64 and heads beyond 128 x 256 take the plain path."""
    if x.q.dtype == torch.float64 or not metala_fits(x.q.shape[-1], x.v.shape[-1]):
        return metala_torch(x)
    check_interpreted(x.q)
    b, s, h, k = x.q.shape
    v = x.v.shape[-1]
    mask = fit(x.mask, b, s, dense=True, dtype=torch.int8)
    segment_ids = fit(x.segment_ids, b, s, dense=True, dtype=torch.int32)
    leaves = (x.q, fit(x.z, b, s, h, k), fit(x.v, b, s, h, v), fit(x.g, b, s, h, v)) if x.packed is None else (x.packed,)
    keep = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (*leaves, x.w, x.state))
    rest = fit(x.w, h, k), fit(x.state, b, h, k, v), mask, segment_ids, launch.ROUND[x.gate_round], keep
    y, final, *_ = metala_forward(*leaves, *rest) if x.packed is None else metala_packed_forward(*leaves, *rest)
    return y, final


def step_warps(key_dim: int, value_dim: int) -> int:
    """Warps per head: more where a state is too large for the registers of four."""
    return 16 if key_dim * value_dim > 64 * 128 else 4


@path("metala.step", "triton")
def metala_step_in_place(
    q: Tensor, z: Tensor, v: Tensor, g: Tensor, w: Tensor, state: Tensor, slots: Tensor | None = None, gate_round: str = "none"
) -> Tensor:
    """One token per row; the state is updated in place.

    Args:
        q: [b, h, k].
        z: gate logits, [b, h, k].
        v: [b, h, v].
        g: output gate, [b, h, v].
        w: [h, k].
        state: fp32 [slots, h, k, v], each row dense.
        slots: int [b], the row of `state` that belongs to each batch row (continuous batching); None means row i of i. They
            are distinct and within the state, which is not checked: that would wait for the device.
        gate_round: as in `MetaLAInputs`.

    Returns:
        y [b, h, v]; fp64 and heads beyond 128 x 256 take the plain path.

    Raises:
        ValueError: the state is not an fp32 tensor of this shape on this device with dense rows, or `slots` does not fit.
    """
    b, h, k = q.shape
    if q.dtype == torch.float64 or not metala_fits(k, v.shape[-1]):
        return metala_step_torch(q, z, v, g, w, state, slots, gate_round)
    check_in_place(state, (h, k, v.shape[2]), torch.float32, v, slots)
    q, z, v, g = head_rows(q), head_rows(z), head_rows(v), head_rows(g)
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if y.numel():
        with device_guard(v):
            step_kernels.step_forward[(b * h,)](
                q, z, v, g, w.contiguous(), state, slots, y,
                q.stride(0), z.stride(0), v.stride(0), g.stride(0), state.stride(0), k**-0.5, launch.EPS, h,
                K=k, V=v.shape[2], BK=padded(k), BV=padded(v.shape[2]), ROUND=launch.ROUND[gate_round],
                HAS_SLOTS=slots is not None, num_warps=step_warps(k, v.shape[2]),
            )  # fmt: skip
    return y
