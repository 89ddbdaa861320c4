"""The gated output of a selective scan on a GPU: one pass forward, one backward. Imported by `triton.py`."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from megatron.ops.dispatch import path
from megatron.ops.kernel_arguments import device_guard, fit
from megatron.ops.precision import outside_autocast
from megatron.ops.selective_scan import triton_gate_kernels as kernels
from megatron.ops.selective_scan.gate import scan_gate_torch

TILE = {"BT": 4, "BD": 128, "num_warps": 4}
# Partial sums of the gain's gradient: a fixed number, so that sums do not depend on the GPU.
_PARTS = 128


def _grid(rows: int, d: int, most: int) -> tuple[int, int]:
    return min(triton.cdiv(rows, TILE["BT"]), most), triton.cdiv(d, TILE["BD"])


@torch.library.custom_op("linear_neox::scan_gate_forward", mutates_args=())
def gate_forward(y: Tensor, u: Tensor, gain: Tensor, z: Tensor) -> Tensor:
    """(y + gain u) silu(z), [..., d] in z's dtype; y in fp32, gain [d]."""
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    d = z.shape[-1]
    if out.numel():
        rows = out.numel() // d
        with device_guard(z):
            kernels.gate_forward[_grid(rows, d, rows)](
                y.contiguous(), u.contiguous(), gain.contiguous(), z.contiguous(), out, rows, d, **TILE
            )
    return out


@gate_forward.register_fake
def _(y: Any, u: Any, gain: Any, z: Any) -> Tensor:
    return torch.empty(z.shape, dtype=z.dtype, device=z.device)


@torch.library.custom_op("linear_neox::scan_gate_backward", mutates_args=())
def gate_backward(dout: Tensor, y: Tensor, u: Tensor, gain: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of y, u, gain and z in their dtypes."""
    dy, du, dz = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (y, u, z))
    d = z.shape[-1]
    if not z.numel():
        return dy, du, torch.zeros_like(gain, memory_format=torch.contiguous_format), dz
    rows = z.numel() // d
    grid = _grid(rows, d, _PARTS)
    parts = torch.empty(grid[0], d, dtype=torch.float32, device=z.device)
    with device_guard(z):
        kernels.gate_backward[grid](
            dout.contiguous(), y.contiguous(), u.contiguous(), gain.contiguous(), z.contiguous(),
            dy, du, parts, dz, rows, d, **TILE,
        )  # fmt: skip
    return dy, du, parts.sum(0).to(gain.dtype), dz


@gate_backward.register_fake
def _(dout: Any, y: Any, u: Any, gain: Any, z: Any) -> Any:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (y, u, gain, z))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


@outside_autocast
def _gradient(ctx: Any, dout: Tensor) -> Any:
    return gate_backward(dout, *ctx.saved_tensors)


gate_forward.register_autograd(_gradient, setup_context=_setup)


@path("selective_scan.gate", "triton")
def scan_gate_fused(y: Tensor, u: Tensor, gain: Tensor, z: Tensor) -> Tensor:
    """The fused path; arguments as `scan_gate` in `ops/selective_scan/gate.py`. fp64 takes the plain path."""
    if y.dtype == torch.float64:
        return scan_gate_torch(y, u, gain, z)
    return gate_forward(y, fit(u, *y.shape), fit(gain, y.shape[-1]), fit(z, *y.shape))
