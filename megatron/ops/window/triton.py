"""The fused path of a step of windowed attention: two launches per layer and token, whatever the window."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops.dispatch import path
from megatron.ops.kernel_arguments import check_in_place, device_guard, head_rows
from megatron.ops.tuning import padded
from megatron.ops.window import triton_kernels as kernels
from megatron.ops.window.operator import window_step_torch


def step_block(d: int) -> int:
    """Entries per step: 4,096 numbers of keys and as many of values in the registers of four warps."""
    return max(16, min(64, 4096 // padded(d)))


@path("window", "triton")
def window_step_fused(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, places: Tensor, seen: Tensor, scale: float
) -> Tensor:
    """Arguments and result as `window_step_` in `ops/window/operator.py`; fp64 takes the plain form.

    Raises:
        ValueError: a tensor of the ring is invalid, or q, k or v do not match the ring.
    """
    if q.dtype == torch.float64:
        return window_step_torch(q, k, v, keys, values, places, seen, scale)
    b, w, g, d = keys.shape
    if w == 0:
        raise ValueError("a ring has one entry or more, in which a step leaves its key and value")
    if tuple(k.shape) != (b, g, d) or v.shape != k.shape or (len(q), q.shape[2]) != (b, d) or q.shape[1] % g:
        raise ValueError(f"a ring {list(keys.shape)} does not fit q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)}")
    for ring in (keys, values):
        check_in_place(ring, (w, g, d), keys.dtype, q, None)
        if not ring.is_contiguous():
            raise ValueError(f"a ring is dense, not {list(ring.shape)} with strides {list(ring.stride())}")
    for counter, shape in ((places, (b, w)), (seen, (b,))):
        fits = tuple(counter.shape) == shape and counter.dtype == torch.int64
        if not fits or not counter.is_contiguous() or counter.device != q.device:
            raise ValueError(
                f"places are int64 [{b}, {w}] and seen int64 [{b}], dense and on {q.device}, "
                f"not {counter.dtype} {list(counter.shape)} on {counter.device}"
            )
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if y.numel():
        q, k, v = head_rows(q), head_rows(k), head_rows(v)
        with device_guard(q):
            kernels.window_step[(b * g,)](
                q, k, v, keys, values, places, seen, y, g, w, d, scale, q.stride(0), k.stride(0), v.stride(0),
                SHARE=q.shape[1] // g, BW=step_block(d), BD=padded(d), num_warps=4,
            )  # fmt: skip
            kernels.window_count[(b,)](places, seen, w, BW=min(1024, padded(w)), num_warps=1 if w <= 256 else 4)
    return y
