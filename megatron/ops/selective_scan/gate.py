"""Mamba's output of the selective scan: a skip connection per channel, and a gate.

    out = (y + D u) silu(z)

Shapes: y, u, z [..., d], D [d]; y in fp32 (fp64), out in z's dtype.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megatron.ops.dispatch import choose, path
from megatron.ops.precision import in_accumulation_dtype


@path("selective_scan.gate", "reference")
@path("selective_scan.gate", "torch")
def scan_gate_torch(y: Tensor, u: Tensor, gain: Tensor, z: Tensor) -> Tensor:
    """The formula above, by autograd."""
    return (y + in_accumulation_dtype(gain) * in_accumulation_dtype(u)).to(z.dtype) * F.silu(z)


def scan_gate(y: Tensor, u: Tensor, gain: Tensor, z: Tensor, *, backend: str = "auto") -> Tensor:
    """The gated output [..., d] in z's dtype.

    Args:
        y: output of the scan, [..., d].
        u: input of the scan, [..., d].
        gain: D, [d].
        z: the gate before its activation, [..., d].
        backend: path of the operator.
    """
    return choose("selective_scan.gate", backend, y.device)(y, u, gain, z)
