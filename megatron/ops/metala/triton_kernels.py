"""Triton kernels of the MetaLA operator; `ops/metala/triton_launch.py` launches them.

What they compute is `metala_reference` in `ops/metala/reference.py`; how they are cut is this. A sequence is cut into chunks of C
tokens. `gate_forward` forms gate, key and running decay of every token once and writes the operands that all others multiply:
with G the running sum of log2 decays inside a chunk and Gm its value at the chunk's middle,

    qs = q 2^(G - Gm)       ks = key 2^(Gm - G)       and per chunk the sums GM = Gm and GL = G of the last token.

Then a score is qs ks^T, what a token adds to the state is ks^T v 2^(GL - GM), and what it reads of it is qs 2^GM: no other kernel
forms an exponential of more than a row. `state_forward`
(`triton_walk_kernels.py`) walks over the chunks and leaves the state before each;
`output_forward` does all chunks at once: scores, state, self-augmentation, per-head LayerNorm and SiLU gate, so that nothing but
the output is written, and for a backward the normalised rows. The backward forms operands and states again from the inputs:
`output_backward` (norm and gates), `state_backward` (gradient of the states, from the last chunk to the first), `value_backward` and `input_backward`. There every gradient keeps the
factor of its operand outside: with X, Y the gradients of qs and ks, q dq = qs X and key dkey = ks Y, whose difference is summed
into the gradient of the decay.

Both factors of a score stay within half a chunk's decay; gate logits are bounded at -40 (decay 0.082 per token) for that, so
that operands stay below 2^116 and are stored in bf16 or fp32, never in fp16. The upper triangle of the scores may overflow and is
removed by `where`, never by a product. Key and value widths need not be powers of two: BK and BV are, and what lies beyond K and
V is masked. Document boundaries come as segment ids, as in `ops/scan/chunk.py`.

Pointers are raw; every tensor [b, t, h, k] is given by its pointer and the stride of one token, heads and channels are dense: q,
z, v and gate may be columns of one packed projection, and their gradients columns of one packed gradient. What the kernels
hand each other is dense.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-40.0)


@triton.jit
def _round(x, ROUND: tl.constexpr):
    """x through bf16 (1) or fp16 (2), as the released half-precision code rounds."""
    if ROUND == 1:
        x = x.to(tl.bfloat16).to(tl.float32)
    if ROUND == 2:
        x = x.to(tl.float16).to(tl.float32)
    return x


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)) as the square of an inverse root, for which there is an instruction; a division takes ten."""
    root = tl.math.rsqrt(1.0 + tl.math.exp2(-x * LOG2E))
    return root * root


@triton.jit
def _gate(z, ROUND: tl.constexpr):
    """log2 of the decay sigmoid(z)^(1/16), and the key 1 - decay, from gate logits; fp32, without cancellation for slow channels.

    log2(1 + x) for x in [0, 1], to 1.5e-7 of itself, small x included, is x times a Chebyshev fit of degree 8. Its coefficients
    below are those divided by -16, and 1 - 2^log2 of slow channels is a series in log2: powers of ln 2 are part of its factors.
    """
    z = tl.maximum(z.to(tl.float32), LOWEST)
    x = tl.math.exp2(-tl.abs(z) * LOG2E)
    p = 0.0026679495625 - x * 0.0004736961
    p = -0.007065749375 + x * p
    p = 0.01233032625 + x * p
    p = -0.017232479375 + x * p
    p = 0.02240178 + x * p
    p = -0.030043468125 + x * p
    p = 0.0450837725 + x * p
    p = -0.09016843885183334 + x * p
    log2 = tl.minimum(z, 0.0) * (LOG2E * 0.0625) + x * p
    if ROUND == 0:
        slow = log2 * (-0.6931471805599453 + log2 * (-0.2402265069591007 + log2 * -0.05550410866482158))
        key = tl.where(log2 > -0.04328, slow, 1.0 - tl.math.exp2(log2))
    else:
        natural = _round(_round(log2 * (16.0 * LN2), ROUND) * 0.0625, ROUND)
        log2 = natural * LOG2E
        key = _round(1.0 - _round(tl.math.exp2(log2), ROUND), ROUND)
    return log2, key


@triton.jit
def _place(N, H):
    """(inner, batch as int64, head) of a program of the grid B * H * N."""
    bh = tl.program_id(0) // N
    return tl.program_id(0) % N, (bh // H).to(tl.int64), bh % H


@triton.jit
def _live(mask, b, t, T, HAS_MASK: tl.constexpr):
    """Which tokens of a chunk count: inside the sequence and not padding."""
    live = t < T
    if HAS_MASK:
        live = live & (tl.load(mask + b * T + t, mask=live, other=0) != 0)
    return live


@triton.jit
def _borders(seg, b, i, t, T, C: tl.constexpr, HAS_SEG: tl.constexpr):
    """(ids, enter, leave [C], carry) of chunk i: whether a token belongs to the incoming / outgoing state's document; 0 or 1."""
    ids = tl.zeros([C], tl.int32)
    enter = t < T
    leave = t < T
    carry = 1.0
    if HAS_SEG:
        ids = tl.load(seg + b * T + tl.minimum(t, T - 1))
        last = tl.load(seg + b * T + tl.minimum(i * C + C - 1, T - 1))
        before = tl.load(seg + b * T + tl.maximum(i * C - 1, 0))
        enter = enter & (ids == before)
        leave = leave & (ids == last)
        carry = tl.where(last == before, 1.0, 0.0)
    return ids, enter, leave, carry


@triton.jit
def _document(seg, b, i, t, T, C: tl.constexpr, HAS_SEG: tl.constexpr):
    """(ids, enter) of rows t of chunk i: their document, and whether it is that of the incoming state."""
    ids = tl.zeros_like(t)
    enter = t < T
    if HAS_SEG:
        ids = tl.load(seg + b * T + tl.minimum(t, T - 1))
        enter = enter & (ids == tl.load(seg + b * T + tl.maximum(i * C - 1, 0)))
    return ids, enter


@triton.jit
def _scaled(x, factor, DT: tl.constexpr):
    """Operand x [C, BK] times a factor [BK] of its channels, in the format of products."""
    return (x.to(tl.float32) * factor[None, :]).to(DT)


@triton.jit
def gate_forward(
    q, z, w, qs, ks, running, GL, GM, amount, mask, sq, sz, T, H,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, RUN: tl.constexpr, ROUND: tl.constexpr,
    HAS_MASK: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * chunks). qs, ks [B, T, H, K]; GL, GM [B, chunks, H, K]; amount = sum of q key w [B, T, H].

    KEEP writes running = G - Gm [B, T, H, K] in fp32 too, for the backward. Outside the sequence, padding: decay 1, key 0, which
    is what an infinite logit gives.

    A chunk is read as [RUN, C / RUN, BK], RUN consecutive tokens along the first axis, which one thread holds (`metala_run`): sums
    along it are additions of registers, and only its totals are summed across threads. With tokens in their order each thread
    would read the partial sums of all warps for every row, a third of the kernel's instructions.
    """
    NT = tl.cdiv(T, C)
    i, b, h = _place(NT, H)
    ok, group, within = tl.arange(0, BK), tl.arange(0, C // RUN), tl.arange(0, RUN)
    t = i * C + group[None, :] * RUN + within[:, None]
    row = b * T + t
    k_inside = (ok < K)[None, None, :]
    inside = (t < T)[:, :, None] & k_inside
    live = _live(mask, b, t, T, HAS_MASK)[:, :, None] & k_inside
    column = h * K + ok[None, None, :]
    log2, key = _gate(tl.load(z + row[:, :, None] * sz + column, mask=live, other=float("inf")), ROUND)
    qq = tl.load(q + row[:, :, None] * sq + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(log2, 0)
    Gm = tl.sum(tl.where((group < C // RUN // 2)[:, None], total, 0.0), 0)
    before = tl.cumsum(total, 0) - total - Gm[None, :]
    from_middle = tl.cumsum(log2, 0) + before[None, :, :]
    at = row[:, :, None] * (H * K) + column
    tl.store(qs + at, (qq * tl.math.exp2(from_middle)).to(qs.dtype.element_ty), mask=inside)
    tl.store(ks + at, (key * tl.math.exp2(-from_middle)).to(ks.dtype.element_ty), mask=inside)
    if KEEP:
        tl.store(running + at, from_middle, mask=inside)
    place = ((b * NT + i) * H + h) * K + ok
    tl.store(GL + place, tl.sum(total, 0), mask=ok < K)
    tl.store(GM + place, Gm, mask=ok < K)
    ww = tl.load(w + h * K + ok, mask=ok < K, other=0.0).to(tl.float32)
    tl.store(amount + row * H + h, tl.sum(qq * key * ww[None, None, :], 2), mask=t < T)


@triton.jit
def _rows(T, H, C: tl.constexpr, R: tl.constexpr):
    """(chunk, tile in the chunk, batch, head) of a program of the grid B * H * chunks * C / R, which holds R rows of a chunk."""
    n, b, h = _place(tl.cdiv(T, C) * (C // R), H)
    return n // (C // R), n % (C // R), b, h


@triton.jit
def _output(
    qs, ks, GM, amount, v, S, seg, b, i, p, h, scale, sv, T, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr, HAS_SEG: tl.constexpr,
):  # fmt: skip
    """Output of tile p of chunk i before its norm, [R, BV] in fp32; 0 outside of T and V."""
    NT = tl.cdiv(T, C)
    ok, ov, oc = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, R)
    t = i * C + p * R + oc
    row = b * T + t
    chunk = (b * NT + i) * H + h
    k_inside = (t < T)[:, None] & (ok < K)[None, :]
    inside = (t < T)[:, None] & (ov < V)[None, :]
    at = row[:, None] * (H * K) + h * K + ok[None, :]
    qq = tl.load(qs + at, mask=k_inside, other=0.0)
    s_inside = (ok < K)[:, None] & (ov < V)[None, :]
    s = tl.load(S + chunk * K * V + ok[:, None] * V + ov[None, :], mask=s_inside, other=0.0)
    ids, enter = _document(seg, b, i, t, T, C, HAS_SEG)
    middle = tl.math.exp2(tl.load(GM + chunk * K + ok, mask=ok < K, other=0.0))
    o = tl.dot(_scaled(tl.where(enter[:, None], qq, 0.0), middle, DT), s, input_precision=PREC)
    if R < C:
        for j in range(0, p):  # tiles in front of this one: no token of theirs lies ahead
            tj = i * C + j * R + oc
            row_j = b * T + tj
            at_j = row_j[:, None] * (H * K) + h * K + ok[None, :]
            kj = tl.load(ks + at_j, mask=(ok < K)[None, :], other=0.0)
            vj = tl.load(v + row_j[:, None] * sv + h * V + ov[None, :], mask=(ov < V)[None, :], other=0.0)
            a = tl.dot(qq, tl.trans(kj), input_precision=PREC)
            if HAS_SEG:
                a = tl.where(ids[:, None] == tl.load(seg + row_j)[None, :], a, 0.0)
            o = tl.dot(a.to(DT), vj, o, input_precision=PREC)
    kk = tl.load(ks + at, mask=k_inside, other=0.0)
    vv = tl.load(v + row[:, None] * sv + h * V + ov[None, :], mask=inside, other=0.0)
    a = tl.dot(qq, tl.trans(kk), input_precision=PREC)
    a = tl.where((oc[:, None] >= oc[None, :]) & (ids[:, None] == ids[None, :]), a, 0.0)
    o = tl.dot(a.to(DT), vv, o, input_precision=PREC) * scale
    augmented = tl.load(amount + row * H + h, mask=t < T, other=0.0)[:, None] * vv.to(tl.float32)
    return tl.where(inside, o + _sigmoid(augmented), 0.0)


@triton.jit
def output_forward(
    qs, ks, GM, amount, v, gate, S, out, normed, inverse, seg, sv, sg, so, scale, eps, T, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr, HAS_SEG: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * chunks * C / R); one program holds all of V, because the norm needs it. BV is V rounded up.

    KEEP writes the normalised output [B, T, H, V] and the inverse deviation [B, T, H] of each row, for the backward.
    """
    i, p, b, h = _rows(T, H, C, R)
    t = i * C + p * R + tl.arange(0, R)
    ov = tl.arange(0, BV)
    row = b * T + t
    inside = (t < T)[:, None] & (ov < V)[None, :]
    o = _output(qs, ks, GM, amount, v, S, seg, b, i, p, h, scale, sv, T, H, K, V, BK, BV, C, R, DT, PREC, HAS_SEG)
    d = tl.where(inside, o - (tl.sum(o, 1) / V)[:, None], 0.0)
    r = 1.0 / tl.sqrt(tl.sum(d * d, 1) / V + eps)
    n = d * r[:, None]
    if KEEP:
        tl.store(normed + row[:, None] * (H * V) + h * V + ov[None, :], n.to(normed.dtype.element_ty), mask=inside)
        tl.store(inverse + row * H + h, r, mask=t < T)
    gt = tl.load(gate + row[:, None] * sg + h * V + ov[None, :], mask=inside, other=0.0).to(tl.float32)
    y = n * gt * _sigmoid(gt)
    tl.store(out + row[:, None] * so + h * V + ov[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def output_backward(
    normed, inverse, amount, v, gate, dy, do, dgate, damount, sv, sg, sy, sdg, N, H,
    V: tl.constexpr, BV: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Grid (N / R), R of the N = B * T * H rows each: from dy to do [B, T, H, V] (dense), dgate and damount [B, T, H]."""
    at = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    row, h = at // H, at % H
    ov = tl.arange(0, BV)
    inside = (at < N)[:, None] & (ov < V)[None, :]
    n = tl.load(normed + at[:, None] * V + ov[None, :], mask=inside, other=0.0).to(tl.float32)
    gt = tl.load(gate + row[:, None] * sg + h[:, None] * V + ov[None, :], mask=inside, other=0.0).to(tl.float32)
    up = tl.load(dy + row[:, None] * sy + h[:, None] * V + ov[None, :], mask=inside, other=0.0).to(tl.float32)
    vf = tl.load(v + row[:, None] * sv + h[:, None] * V + ov[None, :], mask=inside, other=0.0).to(tl.float32)
    r = tl.load(inverse + at, mask=at < N, other=0.0)
    am = tl.load(amount + at, mask=at < N, other=0.0)
    sgt = _sigmoid(gt)
    dgg = up * n * sgt * (1.0 + gt * (1.0 - sgt))
    tl.store(dgate + row[:, None] * sdg + h[:, None] * V + ov[None, :], dgg.to(dgate.dtype.element_ty), mask=inside)
    dn = up * gt * sgt
    dd = (dn - (tl.sum(dn, 1) / V)[:, None] - n * (tl.sum(dn * n, 1) / V)[:, None]) * r[:, None]
    dd = tl.where(inside, dd, 0.0)
    tl.store(do + at[:, None] * V + ov[None, :], dd.to(do.dtype.element_ty), mask=inside)
    sig = _sigmoid(am[:, None] * vf)
    tl.store(damount + at, tl.sum(dd * sig * (1.0 - sig) * vf, 1), mask=at < N)


@triton.jit
def value_backward(
    qs, ks, GL, GM, amount, v, dS, do, dv, seg, sv, sdv, scale, T, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr, HAS_SEG: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * chunks * V / BV). Writes dv [B, T, H, V]: what later queries, the state and the augmentation give."""
    n_v = tl.cdiv(V, BV)
    n, b, h = _place(tl.cdiv(T, C) * n_v, H)
    i, i_v = n // n_v, n % n_v
    ok, oc = tl.arange(0, BK), tl.arange(0, C)
    ov = i_v * BV + tl.arange(0, BV)
    t = i * C + oc
    row = b * T + t
    chunk = (b * tl.cdiv(T, C) + i) * H + h
    k_inside = (t < T)[:, None] & (ok < K)[None, :]
    inside = (t < T)[:, None] & (ov < V)[None, :]
    at = row[:, None] * (H * K) + h * K + ok[None, :]
    qq = tl.load(qs + at, mask=k_inside, other=0.0)
    kk = tl.load(ks + at, mask=k_inside, other=0.0)
    dd = tl.load(do + row[:, None] * (H * V) + h * V + ov[None, :], mask=inside, other=0.0)
    ds = tl.load(dS + chunk * K * V + ok[:, None] * V + ov[None, :], mask=(ok < K)[:, None] & (ov < V)[None, :], other=0.0)
    ids, _, leave, _ = _borders(seg, b, i, t, T, C, HAS_SEG)
    last = tl.load(GL + chunk * K + ok, mask=ok < K, other=0.0)
    after = tl.math.exp2(last - tl.load(GM + chunk * K + ok, mask=ok < K, other=0.0))
    # the scores transposed, formed so: a row is a key, and the queries that see it stand at or after it
    a = tl.dot(kk, tl.trans(qq), input_precision=PREC)
    a = tl.where((oc[:, None] <= oc[None, :]) & (ids[:, None] == ids[None, :]), a * scale, 0.0)
    dvv = tl.dot(_scaled(tl.where(leave[:, None], kk, 0.0), after, DT), ds, input_precision=PREC)
    dvv = tl.dot(a.to(DT), dd, dvv, input_precision=PREC)
    am = tl.load(amount + row * H + h, mask=t < T, other=0.0)[:, None]
    vv = tl.load(v + row[:, None] * sv + h * V + ov[None, :], mask=inside, other=0.0).to(tl.float32)
    sig = _sigmoid(am * vv)
    dvv += dd.to(tl.float32) * sig * (1.0 - sig) * am
    tl.store(dv + row[:, None] * sdv + h * V + ov[None, :], dvv.to(dv.dtype.element_ty), mask=inside)


@triton.jit
def input_backward(
    qs, ks, running, GL, GM, z, v, w, S, dS, do, damount, dq, dz, dw, seg, mask,
    sz, sv, sdq, sdz, scale, T, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr, HAS_SEG: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * chunks). Writes dq, dz [B, T, H, K] and each chunk's part of dw [B, chunks, H, K]."""
    NT = tl.cdiv(T, C)
    i, b, h = _place(NT, H)
    ok = tl.arange(0, BK)
    oc = tl.arange(0, C)
    t = i * C + oc
    here = t < T
    row = b * T + t
    chunk = (b * NT + i) * H + h
    k_inside = here[:, None] & (ok < K)[None, :]
    at = row[:, None] * (H * K) + h * K + ok[None, :]
    qq = tl.load(qs + at, mask=k_inside, other=0.0)
    kk = tl.load(ks + at, mask=k_inside, other=0.0)
    ids, enter, leave, carry = _borders(seg, b, i, t, T, C, HAS_SEG)
    Gl = tl.load(GL + chunk * K + ok, mask=ok < K, other=0.0)
    Gm = tl.load(GM + chunk * K + ok, mask=ok < K, other=0.0)
    after = tl.math.exp2(Gl - Gm)
    seen = (oc[:, None] >= oc[None, :]) & (ids[:, None] == ids[None, :])
    da = tl.zeros([C, C], tl.float32)
    dqs = tl.zeros([C, BK], tl.float32)
    dks = tl.zeros([C, BK], tl.float32)
    sds = tl.zeros([BK], tl.float32)
    for i_v in range(0, tl.cdiv(V, BV)):
        ov = i_v * BV + tl.arange(0, BV)
        v_inside = here[:, None] & (ov < V)[None, :]
        s_inside = (ok < K)[:, None] & (ov < V)[None, :]
        vv = tl.load(v + row[:, None] * sv + h * V + ov[None, :], mask=v_inside, other=0.0)
        dd = tl.load(do + row[:, None] * (H * V) + h * V + ov[None, :], mask=v_inside, other=0.0)
        s = tl.load(S + chunk * K * V + ok[:, None] * V + ov[None, :], mask=s_inside, other=0.0)
        ds = tl.load(dS + chunk * K * V + ok[:, None] * V + ov[None, :], mask=s_inside, other=0.0)
        sds += tl.sum(s.to(tl.float32) * ds.to(tl.float32), 1)
        da = tl.dot(dd, tl.trans(vv), da, input_precision=PREC)
        dqs = tl.dot(dd, tl.trans(s), dqs, input_precision=PREC)
        dks = tl.dot(vv, tl.trans(ds), dks, input_precision=PREC)
    da = tl.where(seen, da * scale, 0.0).to(kk.dtype)
    dks = tl.where(leave[:, None], dks, 0.0) * after[None, :]
    kf = kk.to(tl.float32)
    # <state after, its gradient>: all that lies after this chunk
    tail = tl.math.exp2(Gl) * carry * sds + tl.sum(kf * dks, 0)
    dqs = tl.where(enter[:, None], dqs, 0.0) * (tl.math.exp2(Gm) * scale)[None, :]
    dqs = tl.dot(da, kk, dqs, input_precision=PREC)
    dks = tl.dot(tl.trans(da), qq, dks, input_precision=PREC)
    qf = qq.to(tl.float32)
    dla = tl.cumsum(qf * dqs - kf * dks, 0, reverse=True) + tail[None, :]
    ww = tl.load(w + h * K + ok, mask=ok < K, other=0.0).to(tl.float32)
    dam = tl.load(damount + row * H + h, mask=here, other=0.0)[:, None]
    tl.store(dw + chunk * K + ok, tl.sum(dam * qf * kf, 0), mask=ok < K)
    from_middle = tl.load(running + at, mask=k_inside, other=0.0)
    toward = tl.math.exp2(from_middle)
    dqq = (dqs + dam * ww[None, :] * kf) * toward
    tl.store(dq + row[:, None] * sdq + h * K + ok[None, :], dqq.to(dq.dtype.element_ty), mask=k_inside)
    dkk = (dks + dam * ww[None, :] * qf) * tl.math.exp2(-from_middle)
    dla -= (1.0 - kf * toward) * dkk  # the key is 1 - decay
    logits = tl.load(z + row[:, None] * sz + h * K + ok[None, :], mask=k_inside, other=40.0).to(tl.float32)
    live = _live(mask, b, t, T, HAS_MASK)[:, None] & (logits >= LOWEST)
    dzz = tl.where(live, dla * 0.0625 * _sigmoid(-logits), 0.0)
    tl.store(dz + row[:, None] * sdz + h * K + ok[None, :], dzz.to(dz.dtype.element_ty), mask=k_inside)
