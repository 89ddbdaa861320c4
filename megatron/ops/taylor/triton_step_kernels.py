"""The Triton kernel of one token of Taylor linear attention, which overwrites its state."""

import triton
import triton.language as tl

from megatron.ops.taylor.triton_kernels import _factors


@triton.jit
def _feature_rows(x, e, F: tl.constexpr):
    """Features e [n] in fp32 of the F numbers at x."""
    left, right, weight = _factors(e, F)
    a = tl.load(x + left, mask=(left >= 0) & (weight > 0.0), other=1.0).to(tl.float32)
    b = tl.load(x + right, mask=(right >= 0) & (weight > 0.0), other=1.0).to(tl.float32)
    return a * b * weight


@triton.jit
def step_forward(
    q, k, v, decay, state, slots, y, sq, sk, sv, ss, eps, H,
    F: tl.constexpr, V: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr,
    HAS_SLOTS: tl.constexpr, HAS_DECAY: tl.constexpr,
):  # fmt: skip
    """Grid (B * H). state [slots, H, E, V + 1] in fp32, rows `ss` apart, is read and written once; decay [H] is a logarithm."""
    b = (tl.program_id(0) // H).to(tl.int64)
    h = tl.program_id(0) % H
    slot = b
    if HAS_SLOTS:
        slot = tl.load(slots + b).to(tl.int64)
    ov = tl.arange(0, BV)
    vv = tl.load(v + b * sv + h * V + ov, mask=ov < V, other=0.0).to(tl.float32)
    fall = 1.0
    if HAS_DECAY:
        fall = tl.exp(tl.load(decay + h))
    home = state + slot * ss + h * E * (V + 1)
    o = tl.zeros([BE, BV], tl.float32)
    d = tl.zeros([BE], tl.float32)
    for e in range(0, E, BE):
        oe = e + tl.arange(0, BE)
        phi_k = _feature_rows(k + b * sk + h * F, oe, F)
        phi_q = _feature_rows(q + b * sq + h * F, oe, F)
        place = home + oe[:, None] * (V + 1) + ov[None, :]
        inside = (oe < E)[:, None] & (ov < V)[None, :]
        last = home + oe * (V + 1) + V
        s = tl.load(place, mask=inside, other=0.0) * fall + phi_k[:, None] * vv[None, :]
        z = tl.load(last, mask=oe < E, other=0.0) + phi_k
        tl.store(place, s, mask=inside)
        tl.store(last, z, mask=oe < E)
        o += phi_q[:, None] * s
        d += phi_q * z
    total = tl.sum(o, 0) / (tl.sum(d, 0) + eps)
    tl.store(y + (b * H + h) * V + ov, total.to(y.dtype.element_ty), mask=ov < V)
