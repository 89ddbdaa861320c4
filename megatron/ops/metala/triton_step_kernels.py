"""Triton kernel of one MetaLA decode step: gate, key, state update, output, norm and output gate of one token of one head.

Launched by `ops/metala/triton.py`. A token costs one read and one write of the fp32 state and nothing else worth counting.
"""

import triton
import triton.language as tl

from megatron.ops.metala.triton_kernels import _gate, _sigmoid


@triton.jit
def step_forward(
    q, z, v, gate, w, state, slots, out, sq, sz, sv, sg, ss, scale, eps, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ROUND: tl.constexpr, HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    """Grid (B * H): one token of one head. The fp32 state [slots, H, K, V], whose rows lie `ss` apart, is changed in place;
    `slots [B]` says whose row is whose."""
    bh = tl.program_id(0)
    b, h = (bh // H).to(tl.int64), bh % H
    ok = tl.arange(0, BK)
    ov = tl.arange(0, BV)
    slot = b
    if HAS_SLOTS:
        slot = tl.load(slots + b).to(tl.int64)
    inside = (ok < K)[:, None] & (ov < V)[None, :]
    place = state + slot * ss + h * K * V + ok[:, None] * V + ov[None, :]
    logits = tl.load(z + b * sz + h * K + ok, mask=ok < K, other=40.0)
    la, key = _gate(logits, ROUND)
    key = tl.where(ok < K, key, 0.0)
    qq = tl.load(q + b * sq + h * K + ok, mask=ok < K, other=0.0).to(tl.float32)
    vv = tl.load(v + b * sv + h * V + ov, mask=ov < V, other=0.0).to(tl.float32)
    s = tl.load(place, mask=inside, other=0.0) * tl.math.exp2(la)[:, None] + key[:, None] * vv[None, :]
    tl.store(place, s, mask=inside)
    ww = tl.load(w + h * K + ok, mask=ok < K, other=0.0).to(tl.float32)
    o = tl.sum(qq[:, None] * s, 0) * scale + _sigmoid(tl.sum(qq * key * ww, 0) * vv)
    mean = tl.sum(tl.where(ov < V, o, 0.0), 0) / V
    d = tl.where(ov < V, o - mean, 0.0)
    r = 1.0 / tl.sqrt(tl.sum(d * d, 0) / V + eps)
    gt = tl.load(gate + b * sg + h * V + ov, mask=ov < V, other=0.0).to(tl.float32)
    tl.store(out + b * (H * V) + h * V + ov, (d * r * gt * _sigmoid(gt)).to(out.dtype.element_ty), mask=ov < V)
