"""Triton kernels of the backward of Taylor linear attention, besides `walk`; the head of `triton_kernels.py` explains them.

`division_backward` turns the gradient of y = n / d into dn = dy / d in the format of products and dd = -<dn, y> in fp32, formed
from the rounded dn, so that the two cancel where they must. `input_backward` does all chunks at once: with states and gradients
of states at its borders a chunk depends on no other one.
"""

import triton
import triton.language as tl

from megatron.ops.taylor.triton_kernels import (
    _borders,
    _chunk_program,
    _factors,
    _kept,
    _polynomial,
    _running,
    _selected,
)


@triton.jit
def division_backward(
    dy, y, den, dn, dd, sdy, eps, N, H, V: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Grid (N / ROWS) over the N = B * T * H rows of y, dn [N, V], den and dd [N]. Rows without a token have no gradient."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ov = tl.arange(0, BV)
    here = row < N
    inside = here[:, None] & (ov < V)[None, :]
    at = row[:, None] * V + ov[None, :]
    up = tl.load(dy + (row // H)[:, None] * sdy + (row % H)[:, None] * V + ov[None, :], mask=inside, other=0.0).to(tl.float32)
    d = tl.load(den + row, mask=here, other=1.0)
    up = tl.where((d > 2.0 * eps)[:, None], up / d[:, None], 0.0).to(dn.dtype.element_ty)
    tl.store(dn + at, up, mask=inside)
    yy = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dd + row, -tl.sum(up.to(tl.float32) * yy, 1), mask=here)


@triton.jit
def _through_features(
    x, g, left, right, weight, dx, BF: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr
):  # fmt: skip
    """dx [C, BF] plus what comes from the gradient g [C, n] of features of x [C, BF]; and those features."""
    a, choose_a = _selected(x, left, BF, DT, PREC)
    b, choose_b = _selected(x, right, BF, DT, PREC)
    g = g * weight[None, :]
    dx = tl.dot((g * b).to(DT), tl.trans(choose_a), dx, input_precision=PREC)
    dx = tl.dot((g * a).to(DT), tl.trans(choose_b), dx, input_precision=PREC)
    return dx, a * b * weight[None, :]


@triton.jit
def input_backward(
    q, k, v, keep, decay, seg, dn, dd, Sn, Sd, dSn, dSd, dq, dk, dv, sq, sk, sv, sl, T, H,
    F: tl.constexpr, V: tl.constexpr, E: tl.constexpr, BF: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr, HAS_KEEP: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_SEG: tl.constexpr,
):  # fmt: skip
    """Grid (B * chunks * H). dn [B, T, H, V], dd [B, T, H]; Sn, Sd before and dSn, dSd after each chunk; dq, dk, dv dense."""
    NT = tl.cdiv(T, C)
    i, b, h = _chunk_program(NT, H)
    of, ov, oc = tl.arange(0, BF), tl.arange(0, BV), tl.arange(0, C)
    t = i * C + oc
    row = b * T + t
    here = t < T
    narrow, wide = here[:, None] & (of < F)[None, :], here[:, None] & (ov < V)[None, :]
    at = (row[:, None] * H + h) * V + ov[None, :]
    qd = tl.load(q + row[:, None] * sq + h * F + of[None, :], mask=narrow, other=0.0).to(DT)
    kd = tl.load(k + row[:, None] * sk + h * F + of[None, :], mask=narrow, other=0.0).to(DT)
    vd = tl.load(v + row[:, None] * sv + h * V + ov[None, :], mask=wide, other=0.0).to(DT)
    up = tl.load(dn + at, mask=wide, other=0.0)
    below = tl.load(dd + row * H + h, mask=here, other=0.0)
    ids, enter, leave, _ = _borders(seg, b, i, t, T, C, HAS_SEG)
    running, whole = _running(decay, b, h, t, T, sl, H, C, HAS_DECAY)
    kept = _kept(keep, row, here, HAS_KEEP)
    reaches = leave * kept
    chunk = ((b * NT + i) * H + h) * E
    gq = tl.zeros([C, BF], tl.float32)
    gk = tl.zeros([C, BF], tl.float32)
    gv = tl.zeros([C, BV], tl.float32)
    for e in range(0, E, BE):
        oe = e + tl.arange(0, BE)
        left, right, weight = _factors(oe, F)
        place = (chunk + oe)[:, None] * V + ov[None, :]
        inside = (oe < E)[:, None] & (ov < V)[None, :]
        g = tl.dot(up, tl.trans(tl.load(Sn + place, mask=inside, other=0.0)), input_precision=PREC)
        if HAS_DECAY:
            g *= tl.exp(running)[:, None]
        g += below[:, None] * tl.load(Sd + chunk + oe, mask=oe < E, other=0.0)[None, :]
        if HAS_SEG:
            g *= enter[:, None]
        gq, _phi = _through_features(qd, g, left, right, weight, gq, BF, DT, PREC)
        ds = tl.load(dSn + place, mask=inside, other=0.0)
        g = tl.dot(vd, tl.trans(ds), input_precision=PREC)
        if HAS_DECAY:
            g *= tl.exp(whole - running)[:, None]
        g += tl.load(dSd + chunk + oe, mask=oe < E, other=0.0)[None, :]
        if HAS_SEG or HAS_KEEP:
            g *= reaches[:, None]
        gk, phi_k = _through_features(kd, g, left, right, weight, gk, BF, DT, PREC)
        gv = tl.dot(phi_k.to(DT), ds, gv, input_precision=PREC)
    if HAS_DECAY:
        gv *= tl.exp(whole - running)[:, None]
    if HAS_SEG:
        gv *= leave[:, None]
    seen = (oc[:, None] >= oc[None, :]) & (ids[:, None] == ids[None, :]) & here[None, :]
    slope, p = _polynomial(qd, kd, seen, F, PREC)
    dp = tl.dot(up, tl.trans(vd), input_precision=PREC)
    if HAS_DECAY:
        fall = tl.exp(tl.where(seen, running[:, None] - running[None, :], 0.0))
        p *= fall
        dp *= fall
    gv = tl.dot(tl.trans(p.to(DT)), up, gv, input_precision=PREC)
    scale: tl.constexpr = F**-0.5
    dp = tl.where(seen, (dp + below[:, None]) * slope * scale, 0.0)
    if HAS_KEEP:
        dp *= kept[None, :]
        gv *= kept[:, None]
    ds_pairs = dp.to(DT)
    gq = tl.dot(ds_pairs, kd, gq, input_precision=PREC)
    gk = tl.dot(tl.trans(ds_pairs), qd, gk, input_precision=PREC)
    small = (row[:, None] * H + h) * F + of[None, :]
    tl.store(dq + small, gq.to(dq.dtype.element_ty), mask=narrow)
    tl.store(dk + small, gk.to(dk.dtype.element_ty), mask=narrow)
    tl.store(dv + at, gv.to(dv.dtype.element_ty), mask=wide)


@triton.jit
def state_backward(
    k, v, keep, dend, dk, dv, sk, sv, T, H,
    F: tl.constexpr, V: tl.constexpr, E: tl.constexpr, BF: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr, HAS_KEEP: tl.constexpr,
):  # fmt: skip
    """Grid (B * chunks * H). Gradients of keys and values of which only the last state dend [B * H, E, V + 1] is used."""
    i, b, h = _chunk_program(tl.cdiv(T, C), H)
    of, ov = tl.arange(0, BF), tl.arange(0, BV)
    t = i * C + tl.arange(0, C)
    row = b * T + t
    here = t < T
    narrow, wide = here[:, None] & (of < F)[None, :], here[:, None] & (ov < V)[None, :]
    kd = tl.load(k + row[:, None] * sk + h * F + of[None, :], mask=narrow, other=0.0).to(DT)
    vd = tl.load(v + row[:, None] * sv + h * V + ov[None, :], mask=wide, other=0.0).to(DT)
    kept = _kept(keep, row, here, HAS_KEEP)
    home = dend + (b * H + h) * E * (V + 1)
    gk = tl.zeros([C, BF], tl.float32)
    gv = tl.zeros([C, BV], tl.float32)
    for e in range(0, E, BE):
        oe = e + tl.arange(0, BE)
        left, right, weight = _factors(oe, F)
        place = home + oe[:, None] * (V + 1) + ov[None, :]
        ds = tl.load(place, mask=(oe < E)[:, None] & (ov < V)[None, :], other=0.0).to(DT)
        g = tl.dot(vd, tl.trans(ds), input_precision=PREC)
        g = (g + tl.load(home + oe * (V + 1) + V, mask=oe < E, other=0.0)[None, :]) * kept[:, None]
        gk, phi = _through_features(kd, g, left, right, weight, gk, BF, DT, PREC)
        gv = tl.dot(phi.to(DT), ds, gv, input_precision=PREC)
    gv *= kept[:, None]
    tl.store(dk + (row[:, None] * H + h) * F + of[None, :], gk.to(dk.dtype.element_ty), mask=narrow)
    tl.store(dv + (row[:, None] * H + h) * V + ov[None, :], gv.to(dv.dtype.element_ty), mask=wide)
