"""Triton kernels of LayerNorm and RMSNorm with the addition in front of them: one pass forward, one backward.

Statistics are not stored: the backward has the row in hand anyway and forms them again. A program takes ROWS rows at a time; in
the backward it goes on to further rows and keeps its part of the weights' gradients, so that there are few parts to sum.
"""

import triton
import triton.language as tl


@triton.jit
def norm_forward(
    x, added, weight, bias, stream, y, N, D, eps,
    BD: tl.constexpr, ROWS: tl.constexpr, CENTRED: tl.constexpr,
    HAS_ADDED: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Grid (N / ROWS). x, added, stream, y [N, D] dense; the sum is rounded to its dtype before it is normed, as it is read later."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    oc = tl.arange(0, BD)
    inside = (row < N)[:, None] & (oc < D)[None, :]
    place = row[:, None] * D + oc[None, :]
    s = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_ADDED:
        s += tl.load(added + place, mask=inside, other=0.0).to(tl.float32)
        narrow = s.to(stream.dtype.element_ty)
        tl.store(stream + place, narrow, mask=inside)
        s = narrow.to(tl.float32)
    if CENTRED:
        s = tl.where(inside, s - (tl.sum(s, 1) / D)[:, None], 0.0)
    n = s * (1.0 / tl.sqrt(tl.sum(s * s, 1) / D + eps))[:, None]
    if HAS_WEIGHT:
        n *= tl.load(weight + oc, mask=oc < D, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        n += tl.load(bias + oc, mask=oc < D, other=0.0).to(tl.float32)[None, :]
    tl.store(y + place, n.to(y.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward(
    s, weight, dy, dtotal, dx, dw, db, N, D, eps,
    BD: tl.constexpr, ROWS: tl.constexpr, CENTRED: tl.constexpr,
    HAS_TOTAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Grid (parts). dx of the sum, with what comes to the sum from elsewhere (dtotal); parts of dw and db [parts, D]."""
    part = tl.program_id(0)
    parts = tl.num_programs(0)
    oc = tl.arange(0, BD)
    gain = tl.full([BD], 1.0, tl.float32)
    if HAS_WEIGHT:
        gain = tl.load(weight + oc, mask=oc < D, other=0.0).to(tl.float32)
    sum_w = tl.zeros([BD], tl.float32)
    sum_b = tl.zeros([BD], tl.float32)
    for block in range(part, tl.cdiv(N, ROWS), parts):
        row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < N)[:, None] & (oc < D)[None, :]
        place = row[:, None] * D + oc[None, :]
        v = tl.load(s + place, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
        if CENTRED:
            v = tl.where(inside, v - (tl.sum(v, 1) / D)[:, None], 0.0)
        r = 1.0 / tl.sqrt(tl.sum(v * v, 1) / D + eps)
        n = v * r[:, None]
        if HAS_WEIGHT:
            sum_w += tl.sum(up * n, 0)
        if HAS_BIAS:
            sum_b += tl.sum(up, 0)
        up *= gain[None, :]
        back = up - n * (tl.sum(up * n, 1) / D)[:, None]
        if CENTRED:
            back -= (tl.sum(up, 1) / D)[:, None]
        back *= r[:, None]
        if HAS_TOTAL:
            back += tl.load(dtotal + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + place, back.to(dx.dtype.element_ty), mask=inside)
    if HAS_WEIGHT:
        tl.store(dw + part * D + oc, sum_w, mask=oc < D)
    if HAS_BIAS:
        tl.store(db + part * D + oc, sum_b, mask=oc < D)
