"""Fused Taylor linear attention on a GPU: custom operators that `torch.compile` keeps in its graph, and the step in place.

Saved for the backward are the inputs, the output and the denominators; states are recomputed, which costs less than storing
them. Numerators of states are stored in the matmul dtype at chunk boundaries and carried in fp32 in between; denominators
are fp32 everywhere. Heads wider than the kernels take (`triton_launch.fits`), and fp64, go to the plain path.

With `TRITON_INTERPRET=1` set before Triton is imported the same code runs on a CPU, slowly: so it is tested without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.ops.dispatch import path
from megatron.ops.kernel_arguments import check_in_place, check_interpreted, device_guard, fit, head_rows
from megatron.ops.precision import outside_autocast
from megatron.ops.summary.taylor import decayed, taylor_summary_torch
from megatron.ops.taylor import triton_launch as launch
from megatron.ops.taylor import triton_step_kernels as step_kernels
from megatron.ops.taylor.features import feature_count
from megatron.ops.taylor.inputs import TaylorInputs
from megatron.ops.taylor.operator import TAYLOR_EPS, taylor_chunked
from megatron.ops.taylor.prefix import prefix_chunked, prefix_scan
from megatron.ops.taylor.step import taylor_step_torch
from megatron.ops.taylor.triton_state import taylor_state
from megatron.ops.tuning import padded, taylor_step_cut


@torch.library.custom_op("linear_neox::taylor_forward", mutates_args=())
def taylor_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    log_decay: Tensor | None,
    segment_ids: Tensor | None,
    state: Tensor | None,
    divide: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state [b, h, e, v + 1] in fp32, and denominators [b, t, h] (empty without `divide`); see `taylor`."""
    return launch.forward(launch.Inputs.of(q, k, v, keep, log_decay, segment_ids, state, divide))


@taylor_forward.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = TaylorInputs(*inputs)
    return *x.empty_results(), x.v.new_empty(x.v.shape[:-1] if x.divide else (0,), dtype=torch.float32)


@torch.library.custom_op("linear_neox::taylor_backward", mutates_args=())
def taylor_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    log_decay: Tensor | None,
    segment_ids: Tensor | None,
    state: Tensor | None,
    y: Tensor,
    below: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v (dense, in their dtypes) and of the initial state (fp32)."""
    x = launch.Inputs.of(q, k, v, keep, log_decay, segment_ids, state, below.numel() > 0)
    return launch.backward(x, dy, dfinal, y, below)


@taylor_backward.register_fake
def _(dy: Any, dfinal: Any, q: Any, k: Any, v: Any, *rest: Any) -> Any:
    b, _, h, f = q.shape
    like = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    return (*like, q.new_empty(b, h, feature_count(f), v.shape[-1] + 1, dtype=torch.float32))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, output[0], output[2])
    ctx.set_materialize_grads(False)  # a final state that nobody uses has no gradient: no zeros are written and read


@outside_autocast
def _gradient(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> Any:
    saved = ctx.saved_tensors
    dy = torch.zeros_like(saved[7]) if dy is None else dy
    dq, dk, dv, dstate = taylor_backward(dy, dfinal, *saved)
    return dq, dk, dv, None, None, None, None if saved[6] is None else dstate, None


taylor_forward.register_autograd(_gradient, setup_context=_setup)


@path("taylor", "triton")
def taylor_fused(x: TaylorInputs) -> tuple[Tensor, Tensor]:
    """The fused path; heads that the kernels do not take, and fp64, go to the plain one."""
    if not launch.fits(x.q, x.v):
        return taylor_chunked(x)
    check_interpreted(x.q)
    b, s, h, f = x.q.shape
    v = x.v.shape[-1]
    x = x._replace(
        k=fit(x.k, b, s, h, f),
        v=fit(x.v, b, s, h, v),
        keep=fit(x.keep, b, s),
        segment_ids=fit(x.segment_ids, b, s),
        state=fit(x.state, b, h, feature_count(f), v + 1),
    )
    y, final, _ = taylor_forward(*x)
    return y, final


@path("taylor.prefix", "triton")
def prefix_fused(
    x: TaylorInputs, k2: Tensor, v2: Tensor, inside: Tensor, behind: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The fused path; heads that the kernels do not take, and fp64, go to the plain one."""
    if not (launch.fits(x.q, x.v) and launch.fits(k2, v2)):
        return prefix_chunked(x, k2, v2, inside, behind)
    (b, _, h, f), m = x.q.shape, k2.shape[1]
    k2, v2, inside = fit(k2, b, m, h, f), fit(v2, b, m, h, x.v.shape[-1]), fit(inside, b, m)
    return prefix_scan(taylor_fused, taylor_state, x, k2, v2, inside, behind)


@path("taylor.summary", "triton")
def summary_fused(k: Tensor, v: Tensor, segment_ids: Tensor | None, log_decay: Tensor | None, keep: Tensor | None) -> Tensor:
    """The fused path; heads that the kernels do not take, and fp64, go to the plain one."""
    if not launch.fits(k, v):
        return taylor_summary_torch(k, v, segment_ids, log_decay, keep)
    check_interpreted(k)
    return taylor_state(k, *decayed(v, segment_ids, log_decay, keep))


@path("taylor.step", "triton")
@outside_autocast
def taylor_step_in_place(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor | None = None, slots: Tensor | None = None
) -> Tensor:
    """One token per row; the state is updated in place.

    Args:
        q: [b, h, f].
        k: [b, h, f].
        v: [b, h, v].
        state: fp32 [slots, h, e, v + 1], each row dense.
        log_decay: logarithm of the decay of the numerators, [h].
        slots: int [b], the row of `state` that belongs to each batch row (continuous batching); None means row i of i.

    Returns:
        y [b, h, v].

    Raises:
        ValueError: the state is not an fp32 tensor of this shape on this device with dense rows, or `slots` does not fit.
    """
    if not launch.fits(q, v):
        return taylor_step_torch(q, k, v, state, log_decay, slots)
    b, h, f = q.shape
    e, width = feature_count(f), v.shape[2]
    check_in_place(state, (h, e, width + 1), torch.float32, v, slots)
    q, k, v = head_rows(q), head_rows(k), head_rows(v)
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if y.numel():
        rows, warps = taylor_step_cut(e, width)
        with device_guard(v):
            step_kernels.step_forward[(b * h,)](
                q, k, v, None if log_decay is None else log_decay.float().contiguous(), state, slots, y,
                q.stride(0), k.stride(0), v.stride(0), state.stride(0), TAYLOR_EPS, h,
                F=f, V=width, E=e, BE=rows, BV=padded(width),
                HAS_SLOTS=slots is not None, HAS_DECAY=log_decay is not None, num_warps=warps,
            )  # fmt: skip
    return y
