"""Triton kernels of Taylor linear attention, forward; `triton_launch.py` launches them and those of the backward.

What they compute is `taylor_chunked` in `ops/taylor/operator.py`; how they are cut is this. A sequence is cut into chunks of C
tokens. `walk` goes over the chunks and leaves the state before each: numerators Sn [B, chunks, H, E, V] in the format of products
and denominators Sd [B, chunks, H, E] in fp32, which never pass through a narrower format. `output` does all chunks at once: a
chunk against itself by the polynomial of its scores, without features, and against the state before it.

Features are formed where they are used. The packed feature e of x is w_e x_i x_j with i and j from the order of
`ops/taylor/features.py`, so a block of features is the product of x with a 0/1 matrix that selects the left factors, times that
with one that selects the right factors: both are exact in every format, and the features come out in the layout in which the
next matrix product takes them from registers. No gather, no feature tensor, any width F.

`walk` cuts the features, not the values, into programs of their own: each carries BE rows of the state and reads all values,
which stay in the L2 cache. The same kernel walks from the right for the backward, with queries for keys, gradients of the
numerators for values and gradients of the denominators for weights.

Document boundaries come as segment ids, padding as weights `keep` of the keys, the decay of the numerators as log_decay, of
which every kernel forms the running sum inside a chunk. Every tensor [b, t, h, n] is given by its pointer and the stride of one
token; heads and channels are dense.
"""

import triton
import triton.language as tl


@triton.jit
def _program(N, H):
    """(inner, batch as int64, head) of a program of the grid B * H * N."""
    bh = tl.program_id(0) // N
    return tl.program_id(0) % N, (bh // H).to(tl.int64), bh % H


@triton.jit
def _chunk_program(NT, H):
    """(chunk, batch as int64, head) of a program of the grid B * NT * H: heads lie side by side in memory."""
    i = tl.program_id(0) // H
    return i % NT, (i // NT).to(tl.int64), tl.program_id(0) % H


@triton.jit
def _factors(e, F: tl.constexpr):
    """(i, j, w) of packed features e [n]: phi_e = w x_i x_j; -1 stands for a factor 1. Beyond the last feature w is 0."""
    m = tl.maximum(e - 1 - F, 0)
    turn = m // F
    left = tl.where(e < 1 + F, e - 1, m % F)
    right = tl.where(e < 1 + F, -1, (m % F + turn) % F)
    root: tl.constexpr = F**-0.25
    weight = tl.where(turn == 0, root * root * 0.7071067811865476, root * root)
    weight = tl.where(e < 1 + F, tl.where(e == 0, 1.0, root), weight)
    return left, right, tl.where(e < 1 + F + F * (F + 1) // 2, weight, 0.0)


@triton.jit
def _selected(x, place, BF: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr):
    """x [C, BF] -> [C, n] in fp32: column place[n] of x, or 1 where that is -1; and the matrix [BF, n] that selects."""
    chooser = tl.where(tl.arange(0, BF)[:, None] == place[None, :], 1.0, 0.0).to(DT)
    return tl.where(place[None, :] < 0, 1.0, tl.dot(x, chooser, input_precision=PREC)), chooser


@triton.jit
def _features(x, e, F: tl.constexpr, BF: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr):
    """Features e [n] of x [C, BF] as [C, n] in fp32."""
    left, right, weight = _factors(e, F)
    a, _ = _selected(x, left, BF, DT, PREC)
    b, _ = _selected(x, right, BF, DT, PREC)
    return a * b * weight[None, :]


@triton.jit
def _features_across(x, e, F: tl.constexpr, BF: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr):
    """Features e [n] of x [C, BF] as [n, C] in fp32."""
    left, right, weight = _factors(e, F)
    of = tl.arange(0, BF)
    turned = tl.trans(x)
    a = tl.dot(tl.where(left[:, None] == of[None, :], 1.0, 0.0).to(DT), turned, input_precision=PREC)
    b = tl.dot(tl.where(right[:, None] == of[None, :], 1.0, 0.0).to(DT), turned, input_precision=PREC)
    return tl.where(left[:, None] < 0, 1.0, a) * tl.where(right[:, None] < 0, 1.0, b) * weight[:, None]


@triton.jit
def _borders(seg, b, i, t, T, C: tl.constexpr, HAS_SEG: tl.constexpr):
    """(ids, enter, leave [C], carry) of chunk i: whether a token belongs to the incoming / outgoing state's document; 0 or 1."""
    ids = tl.zeros([C], tl.int32)
    enter = tl.where(t < T, 1.0, 0.0)
    leave = enter
    carry = 1.0
    if HAS_SEG:
        ids = tl.load(seg + b * T + tl.minimum(t, T - 1))
        last = tl.load(seg + b * T + tl.minimum(i * C + C - 1, T - 1))
        before = tl.load(seg + b * T + tl.maximum(i * C - 1, 0))
        enter = tl.where(ids == before, enter, 0.0)
        leave = tl.where(ids == last, leave, 0.0)
        carry = tl.where(last == before, 1.0, 0.0)
    return ids, enter, leave, carry


@triton.jit
def _kept(keep, row, here, HAS_KEEP: tl.constexpr):
    """Weights [C] of the keys: 0 outside of the sequence and at padding."""
    weight = tl.where(here, 1.0, 0.0)
    if HAS_KEEP:
        weight = tl.load(keep + row, mask=here, other=0.0)
    return weight


@triton.jit
def _running(decay, b, h, t, T, sl, H, C: tl.constexpr, HAS_DECAY: tl.constexpr):
    """Running sum [C] of log decays inside a chunk, and that of all of it; 0 without decay. sl: from one row to the next."""
    running = tl.zeros([C], tl.float32)
    whole = 0.0
    if HAS_DECAY:
        each = tl.load(decay + b * sl + t * H + h, mask=t < T, other=0.0)
        running = tl.cumsum(each, 0)
        whole = tl.sum(each, 0)
    return running, whole


@triton.jit
def _polynomial(q, k, seen, F: tl.constexpr, PREC: tl.constexpr):
    """(1 + s, p) of all pairs [C, C] of q, k [C, BF]; p is 0 where a pair is not seen."""
    scale: tl.constexpr = F**-0.5
    slope = 1.0 + tl.dot(q, tl.trans(k), input_precision=PREC) * scale
    return slope, tl.where(seen, 0.5 + 0.5 * slope * slope, 0.0)


@triton.jit
def walk(
    x, u, counts, decay, seg, first, Sn, Sd, end, sx, su, sl, T, H,
    F: tl.constexpr, V: tl.constexpr, E: tl.constexpr, BF: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_KEEP: tl.constexpr, HAS_DECAY: tl.constexpr,
    HAS_SEG: tl.constexpr, BACK: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * E / BE * V / BV): one program carries BE features by BV values from `first` [B * H, E, V + 1] to `end`.

    Forward: x = k, u = v, counts = keep [B, T]; Sn and Sd get the state before each chunk. BACK: x = q, u and counts [B, T, H] are
    the gradients of the numerators and denominators; Sn and Sd get the gradient of the state after each chunk. Without STORE only
    the end is written.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    inner, b, h = _program((E + BE - 1) // BE * NV, H)
    oe = inner // NV * BE + tl.arange(0, BE)
    ov = inner % NV * BV + tl.arange(0, BV)
    of, oc = tl.arange(0, BF), tl.arange(0, C)
    inside = (oe < E)[:, None] & (ov < V)[None, :]
    leads = (oe < E) & (inner % NV == 0)
    home = (b * H + h) * E * (V + 1)
    s = tl.zeros([BE, BV], tl.float32)
    z = tl.zeros([BE], tl.float32)
    if HAS_FIRST:
        s += tl.load(first + home + oe[:, None] * (V + 1) + ov[None, :], mask=inside, other=0.0)
        z += tl.load(first + home + oe * (V + 1) + V, mask=oe < E, other=0.0)
    NT = tl.cdiv(T, C)
    for n in range(0, NT):
        i = NT - 1 - n if BACK else n
        chunk = ((b * NT + i) * H + h) * E
        if STORE:
            tl.store(Sn + (chunk + oe)[:, None] * V + ov[None, :], s.to(Sn.dtype.element_ty), mask=inside)
            tl.store(Sd + chunk + oe, z, mask=leads)
        t = i * C + oc
        row = b * T + t
        xx = tl.load(x + row[:, None] * sx + h * F + of[None, :], mask=(t < T)[:, None] & (of < F)[None, :], other=0.0)
        uu = tl.load(u + row[:, None] * su + h * V + ov[None, :], mask=(t < T)[:, None] & (ov < V)[None, :], other=0.0)
        _, enter, leave, carry = _borders(seg, b, i, t, T, C, HAS_SEG)
        running, whole = _running(decay, b, h, t, T, sl, H, C, HAS_DECAY)
        if BACK:
            below = enter * tl.load(counts + row * H + h, mask=t < T, other=0.0)
            above = enter * tl.exp(running)
        else:
            below = leave * _kept(counts, row, t < T, HAS_KEEP)
            above = below * tl.exp(whole - running)
        phi = _features_across(xx.to(DT), oe, F, BF, DT, PREC)
        z = z * carry + tl.sum(phi * below[None, :], 1)
        if HAS_SEG or HAS_DECAY or (HAS_KEEP and not BACK):
            phi = phi * above[None, :]
            s = s * (carry * tl.exp(whole))
        s = tl.dot(phi.to(DT), uu.to(DT), s, input_precision=PREC)
    tl.store(end + home + oe[:, None] * (V + 1) + ov[None, :], s, mask=inside)
    tl.store(end + home + oe * (V + 1) + V, z, mask=leads)


@triton.jit
def output(
    q, k, v, keep, decay, seg, Sn, Sd, y, den, sq, sk, sv, sl, eps, T, H,
    F: tl.constexpr, V: tl.constexpr, E: tl.constexpr, BF: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr, HAS_KEEP: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_SEG: tl.constexpr,
    DIVIDE: tl.constexpr,
):  # fmt: skip
    """Grid (B * chunks * H). y [B, T, H, V] and den [B, T, H] (eps included) in fp32.

    Without DIVIDE y [B, T, H, V + 1] gets the numerators and beside them the denominators without eps.
    """
    NT = tl.cdiv(T, C)
    i, b, h = _chunk_program(NT, H)
    of, ov, oc = tl.arange(0, BF), tl.arange(0, BV), tl.arange(0, C)
    t = i * C + oc
    row = b * T + t
    here = t < T
    narrow, wide = here[:, None] & (of < F)[None, :], here[:, None] & (ov < V)[None, :]
    qd = tl.load(q + row[:, None] * sq + h * F + of[None, :], mask=narrow, other=0.0).to(DT)
    ids, enter, _, _ = _borders(seg, b, i, t, T, C, HAS_SEG)
    running, _ = _running(decay, b, h, t, T, sl, H, C, HAS_DECAY)
    chunk = ((b * NT + i) * H + h) * E
    o = tl.zeros([C, BV], tl.float32)
    d = tl.zeros([C], tl.float32)
    for e in range(0, E, BE):
        oe = e + tl.arange(0, BE)
        s = tl.load(Sn + (chunk + oe)[:, None] * V + ov[None, :], mask=(oe < E)[:, None] & (ov < V)[None, :], other=0.0)
        z = tl.load(Sd + chunk + oe, mask=oe < E, other=0.0)
        phi = _features(qd, oe, F, BF, DT, PREC)
        d += tl.sum(phi * z[None, :], 1)
        o = tl.dot(phi.to(DT), s, o, input_precision=PREC)
    if HAS_SEG or HAS_DECAY:
        o *= (enter * tl.exp(running))[:, None]
        d *= enter
    kd = tl.load(k + row[:, None] * sk + h * F + of[None, :], mask=narrow, other=0.0).to(DT)
    vd = tl.load(v + row[:, None] * sv + h * V + ov[None, :], mask=wide, other=0.0).to(DT)
    seen = (oc[:, None] >= oc[None, :]) & (ids[:, None] == ids[None, :]) & here[None, :]
    _, p = _polynomial(qd, kd, seen, F, PREC)
    if HAS_KEEP:
        p *= _kept(keep, row, here, HAS_KEEP)[None, :]
    d += tl.sum(p, 1)
    if HAS_DECAY:
        p *= tl.exp(tl.where(seen, running[:, None] - running[None, :], 0.0))
    o = tl.dot(p.to(DT), vd, o, input_precision=PREC)
    if DIVIDE:
        d += eps
        o = o / d[:, None]
        tl.store(den + row * H + h, d, mask=here)
        tl.store(y + (row[:, None] * H + h) * V + ov[None, :], o.to(y.dtype.element_ty), mask=wide)
    else:
        tl.store(y + (row * H + h) * (V + 1) + V, d, mask=here)
        tl.store(y + (row[:, None] * H + h) * (V + 1) + ov[None, :], o, mask=wide)
