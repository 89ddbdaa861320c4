"""Triton kernels of the gated output of a selective scan, `(y + D u) silu(z)`: forward, and backward with the sums of D's gradient.

Rows are tokens, [n, D], dense. The backward's programs walk over rows, so that the sums of a column are few.
"""

import triton
import triton.language as tl


@triton.jit
def gate_forward(y, u, gain, z, out, n, D, BT: tl.constexpr, BD: tl.constexpr):
    """Grid (n / BT, D / BD)."""
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    oc = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = (rows < n)[:, None] & (oc < D)[None, :]
    at = rows[:, None] * D + oc[None, :]
    skip = tl.load(gain + oc, mask=oc < D, other=0.0).to(tl.float32)
    total = tl.load(y + at, mask=inside, other=0.0) + skip[None, :] * tl.load(u + at, mask=inside, other=0.0).to(tl.float32)
    logits = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (total * logits * tl.sigmoid(logits)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_backward(dout, y, u, gain, z, dy, du, dgain, dz, n, D, BT: tl.constexpr, BD: tl.constexpr):
    """Grid (parts of the rows, D / BD). dy in fp32; dgain [parts, D]."""
    oc = tl.program_id(1) * BD + tl.arange(0, BD)
    skip = tl.load(gain + oc, mask=oc < D, other=0.0).to(tl.float32)
    sums = tl.zeros([BT, BD], tl.float32)
    for first in range(tl.program_id(0) * BT, n, tl.num_programs(0) * BT):
        rows = (first + tl.arange(0, BT)).to(tl.int64)
        inside = (rows < n)[:, None] & (oc < D)[None, :]
        at = rows[:, None] * D + oc[None, :]
        up = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(u + at, mask=inside, other=0.0).to(tl.float32)
        total = tl.load(y + at, mask=inside, other=0.0) + skip[None, :] * x
        logits = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
        sig = tl.sigmoid(logits)
        grad = up * logits * sig
        tl.store(dy + at, grad, mask=inside)
        tl.store(du + at, (grad * skip[None, :]).to(du.dtype.element_ty), mask=inside)
        tl.store(dz + at, (up * total * sig * (1.0 + logits * (1.0 - sig))).to(dz.dtype.element_ty), mask=inside)
        sums += grad * x
    tl.store(dgain + tl.program_id(0).to(tl.int64) * D + oc, tl.sum(sums, 0), mask=oc < D)
