"""The MetaLA decode step on a GPU: launches `metala_step_kernels.py`; the state is changed in place."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops import metala_step_kernels as kernels
from megatron.ops.dispatch import path
from megatron.ops.kernel_arguments import check_in_place, device_guard
from megatron.ops.metala_launch import EPS, ROUND
from megatron.ops.tuning import padded


def step_warps(key_dim: int, value_dim: int) -> int:
    """Warps per head: more where a state is too large for the registers of four."""
    return 16 if key_dim * value_dim > 64 * 128 else 4


@path("metala_step", "triton")
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
        state: fp32 [slots, h, k, v], dense.
        slots: int [b], the row of `state` that belongs to each batch row (continuous batching); None means row i of i.
        gate_round: as in `ops/metala.py`.

    Returns:
        y [b, h, v].

    Raises:
        ValueError: the state is not a dense fp32 tensor of this shape on this device, or `slots` does not fit.
    """
    b, h, k = q.shape
    check_in_place(state, (h, k, v.shape[2]), torch.float32, v, slots)
    q, z, v, g = (x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous() for x in (q, z, v, g))
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if y.numel():
        with device_guard(v):
            kernels.step_forward[(b * h,)](
                q, z, v, g, w.contiguous(), state, slots, y,
                q.stride(0), z.stride(0), v.stride(0), g.stride(0), k**-0.5, EPS, h,
                K=k, V=v.shape[2], BK=padded(k), BV=padded(v.shape[2]), ROUND=ROUND[gate_round], HAS_SLOTS=slots is not None,
                num_warps=step_warps(k, v.shape[2]),
            )  # fmt: skip
    return y
