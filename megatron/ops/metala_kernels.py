"""Triton kernels of the MetaLA operator: two forward, three backward, one to split a sequence. `ops/metala_launch.py` launches them.

What they compute is `metala_reference` in `ops/metala.py`; how they are cut is this. A sequence is cut into chunks of C tokens.
`state_forward` walks over the chunks and leaves the state before each; `output_forward` then does all chunks at once, in tiles
of C / NSUP rows: gate, key, decay, scan, self-augmentation, per-head LayerNorm and SiLU gate, so that nothing but the output is
written. The backward recomputes all of that from the inputs: `output_backward` (norm and gates), `state_backward` (gradient of
the states, from the last chunk to the first) and `input_backward`.

The two state kernels are sequential; where batch x heads is too small to fill a GPU they run twice on parts of the sequence side
by side: once from zero for what each part adds and what it leaves of its start, and, after `join_parts` has put these one behind
the other, once more from the right starts. Decay is per channel, so a part's effect on its start is one factor per key channel.

Decays are kept as base-2 logarithms. A chunk's running sum G is referenced to the middle of the chunk (Gm), so that both factors
of a score stay within half a chunk's decay; gate logits are bounded at -40 (decay 0.082 per token) for that. The upper triangle
of the scores may overflow and is removed by `where`, never by a product. Key and value widths need not be powers of two: BK and
BV are, and what lies beyond K and V is masked. Document boundaries come as segment ids, as in `ops/chunk.py`.

Pointers are raw; every tensor [b, t, h, k] is given by its pointer and the stride of one token, heads and channels are dense: q,
z, v and gate may be columns of one packed projection, and their gradients columns of one packed gradient.
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
def _gate(z, ROUND: tl.constexpr):
    """log2 of the decay, and the key 1 - decay, from gate logits; fp32, without cancellation for slow channels."""
    z = tl.maximum(z.to(tl.float32), LOWEST)
    small = tl.math.exp2(-tl.abs(z) * LOG2E)
    if ROUND == 0:
        log2 = -(tl.maximum(-z, 0.0) * LOG2E + tl.math.log2(1.0 + small)) * 0.0625
        x = log2 * LN2
        key = tl.where(x > -0.03, -x * (1.0 + x * (0.5 + x * 0.16666667)), 1.0 - tl.math.exp2(log2))
    else:
        natural = _round(-(tl.maximum(-z, 0.0) + tl.math.log2(1.0 + small) * LN2), ROUND)
        natural = _round(natural * 0.0625, ROUND)
        log2 = natural * LOG2E
        key = _round(1.0 - _round(tl.math.exp2(log2), ROUND), ROUND)
    return log2, key


@triton.jit
def _place(N, H):
    """(inner, batch as int64, head) of a program of the grid B * H * N."""
    bh = tl.program_id(0) // N
    return tl.program_id(0) % N, (bh // H).to(tl.int64), bh % H


@triton.jit
def _load_gate(z, row, live, ok, K: tl.constexpr, ROUND: tl.constexpr):
    """Gate logits [C, BK], log2 decays and keys of a chunk; outside the sequence, padding and width: decay 1, key 0."""
    inside = live[:, None] & (ok < K)[None, :]
    logits = tl.load(z + row[:, None] + ok[None, :], mask=inside, other=40.0).to(tl.float32)
    log2, key = _gate(logits, ROUND)
    return logits, tl.where(inside, log2, 0.0), tl.where(inside, key, 0.0)


@triton.jit
def _live(mask, b, t, T, HAS_MASK: tl.constexpr):
    """Which tokens of a chunk count: inside the sequence and not padding."""
    live = t < T
    if HAS_MASK:
        live = live & (tl.load(mask + b * T + t, mask=live, other=0) != 0)
    return live


@triton.jit
def _borders(seg, b, i, t, T, C: tl.constexpr, HAS_SEG: tl.constexpr):
    """(ids [C], enter [C], leave [C], carry) of chunk i: 1 where a token belongs to the incoming / outgoing state's document."""
    ids = tl.zeros([C], tl.int32)
    enter = tl.full([C], 1.0, tl.float32)
    leave = tl.full([C], 1.0, tl.float32)
    carry = 1.0
    if HAS_SEG:
        ids = tl.load(seg + b * T + tl.minimum(t, T - 1))
        last = tl.load(seg + b * T + tl.minimum(i * C + C - 1, T - 1))
        before = tl.load(seg + b * T + tl.maximum(i * C - 1, 0))
        enter = tl.where(ids == before, 1.0, 0.0)
        leave = tl.where(ids == last, 1.0, 0.0)
        carry = tl.where(last == before, 1.0, 0.0)
    return ids, enter, leave, carry


@triton.constexpr_function
def _score_type(DT):
    """Operands of a score carry half a chunk's decay, which leaves fp16's range: tf32 has its precision and fp32's range."""
    return tl.float32 if DT.is_fp16() else DT


@triton.jit
def _scores(q, key, G, Gm, ids, oc, DT: tl.constexpr, PREC: tl.constexpr):
    """Lower triangle [C, C] of q_i . exp(L_i - L_j) key_j within one document, unscaled."""
    ST: tl.constexpr = _score_type(DT)
    a = tl.dot(
        (q * tl.math.exp2(G - Gm[None, :])).to(ST), tl.trans((key * tl.math.exp2(Gm[None, :] - G)).to(ST)), input_precision=PREC
    )
    return tl.where((oc[:, None] >= oc[None, :]) & (ids[:, None] == ids[None, :]), a, 0.0)


@triton.jit
def state_forward(
    z, v, S, h0, ht, keep, seg, mask, sz, sv, PER, T, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr, ROUND: tl.constexpr, HAS_H0: tl.constexpr, HAS_SEG: tl.constexpr, HAS_MASK: tl.constexpr,
    STORE: tl.constexpr, END: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * V / BV, parts): one program walks over the PER chunks of its part of the sequence.

    Starts from h0 [B * H, parts, K, V] or zero. STORE writes the state before every chunk to S [B, NT, H, K, V], END the last one
    of each part to ht [B * H, parts, K, V] (fp32), KEEP the factor [B * H, parts, K] of what the part leaves of its initial state.
    """
    i_v, b, h = _place(tl.cdiv(V, BV), H)
    part = tl.program_id(1)
    mine = (b * H + h) * tl.num_programs(1) + part
    ok = tl.arange(0, BK)
    ov = i_v * BV + tl.arange(0, BV)
    oc = tl.arange(0, C)
    inside = (ok < K)[:, None] & (ov < V)[None, :]
    place = ok[:, None] * V + ov[None, :]
    s = tl.zeros([BK, BV], tl.float32)
    if HAS_H0:
        s += tl.load(h0 + mine * K * V + place, mask=inside, other=0.0)
    whole = tl.full([BK], 1.0, tl.float32)
    NT = tl.cdiv(T, C)
    for i in range(part * PER, tl.minimum(NT, (part + 1) * PER)):
        if STORE:
            tl.store(S + ((b * NT + i) * H + h) * K * V + place, s.to(S.dtype.element_ty), mask=inside)
        t = i * C + oc
        live = _live(mask, b, t, T, HAS_MASK)
        row = b * T + t
        _, la, key = _load_gate(z + h * K, row * sz, live, ok, K, ROUND)
        vv = tl.load(v + row[:, None] * sv + h * V + ov[None, :], mask=live[:, None] & (ov < V)[None, :], other=0.0)
        _, _, leave, carry = _borders(seg, b, i, t, T, C, HAS_SEG)
        G = tl.cumsum(la, 0)
        Gl = tl.sum(la, 0)
        kept = key * tl.math.exp2(Gl[None, :] - G) * leave[:, None]
        factor = tl.math.exp2(Gl) * carry
        s = tl.dot(tl.trans(kept.to(DT)), vv.to(DT), s * factor[:, None], input_precision=PREC)
        whole *= factor
    if END:
        tl.store(ht + mine * K * V + place, s, mask=inside)
    if KEEP:
        tl.store(keep + mine * K + ok, whole, mask=(ok < K) & (i_v == 0))


@triton.jit
def join_parts(
    end, keep, first, start, last, PARTS,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, HAS_FIRST: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * V / BV): what each part left alone, in order (or in reverse), becomes what each starts from, and the last one."""
    bh = (tl.program_id(0) // tl.cdiv(V, BV)).to(tl.int64)
    ok = tl.arange(0, BK)
    ov = tl.program_id(0) % tl.cdiv(V, BV) * BV + tl.arange(0, BV)
    inside = (ok < K)[:, None] & (ov < V)[None, :]
    place = ok[:, None] * V + ov[None, :]
    s = tl.zeros([BK, BV], tl.float32)
    if HAS_FIRST:
        s += tl.load(first + bh * K * V + place, mask=inside, other=0.0)
    for j in range(0, PARTS):
        at = bh * PARTS + (PARTS - 1 - j if REVERSE else j)
        tl.store(start + at * K * V + place, s, mask=inside)
        left = tl.load(keep + at * K + ok, mask=ok < K, other=0.0)
        s = s * left[:, None] + tl.load(end + at * K * V + place, mask=inside, other=0.0)
    tl.store(last + bh * K * V + place, s, mask=inside)


@triton.jit
def output_forward(
    q, z, v, gate, w, S, out, seg, mask, sq, sz, sv, sg, so, scale, eps, T, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, NSUP: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr, ROUND: tl.constexpr, HAS_SEG: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * chunks / NSUP); one program holds all of V, because the norm needs it. BV is V rounded up."""
    NS = tl.cdiv(tl.cdiv(T, C), NSUP)
    i_s, b, h = _place(NS, H)
    ok, ov, oc = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, C)
    s_inside = (ok < K)[:, None] & (ov < V)[None, :]
    s = tl.load(S + ((b * NS + i_s) * H + h) * K * V + ok[:, None] * V + ov[None, :], mask=s_inside, other=0.0).to(tl.float32)
    ww = tl.load(w + h * K + ok, mask=ok < K, other=0.0).to(tl.float32)
    for j in range(0, NSUP):
        i = i_s * NSUP + j
        t = i * C + oc
        inside = (t < T)[:, None] & (ov < V)[None, :]
        live = _live(mask, b, t, T, HAS_MASK)
        row = b * T + t
        _, la, key = _load_gate(z + h * K, row * sz, live, ok, K, ROUND)
        qq = tl.load(q + row[:, None] * sq + h * K + ok[None, :], mask=(t < T)[:, None] & (ok < K)[None, :], other=0.0).to(
            tl.float32
        )
        vv = tl.load(v + row[:, None] * sv + h * V + ov[None, :], mask=inside, other=0.0)
        ids, enter, leave, carry = _borders(seg, b, i, t, T, C, HAS_SEG)
        G = tl.cumsum(la, 0)
        Gl = tl.sum(la, 0)
        Gm = tl.sum(tl.where(oc[:, None] < C // 2, la, 0.0), 0)
        a = _scores(qq, key, G, Gm, ids, oc, DT, PREC)
        o = tl.dot((qq * tl.math.exp2(G) * enter[:, None]).to(DT), s.to(DT), input_precision=PREC)
        o = tl.dot(a.to(DT), vv.to(DT), o, input_precision=PREC) * scale
        amount = tl.sum(qq * key * ww[None, :], 1)
        o += tl.sigmoid(amount[:, None] * vv.to(tl.float32))
        mean = tl.sum(tl.where(inside, o, 0.0), 1) / V
        d = tl.where((ov < V)[None, :], o - mean[:, None], 0.0)
        r = 1.0 / tl.sqrt(tl.sum(d * d, 1) / V + eps)
        gt = tl.load(gate + row[:, None] * sg + h * V + ov[None, :], mask=inside, other=0.0).to(tl.float32)
        y = d * r[:, None] * gt * tl.sigmoid(gt)
        tl.store(out + row[:, None] * so + h * V + ov[None, :], y.to(out.dtype.element_ty), mask=inside)
        if NSUP > 1:
            kept = key * tl.math.exp2(Gl[None, :] - G) * leave[:, None]
            s = tl.dot(tl.trans(kept.to(DT)), vv.to(DT), s * (tl.math.exp2(Gl) * carry)[:, None], input_precision=PREC)


@triton.jit
def output_backward(
    q, z, v, gate, w, S, dy, do, dgate, damount, seg, mask, sq, sz, sv, sg, sy, sdg, scale, eps, T, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr, ROUND: tl.constexpr, HAS_SEG: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * chunks). Recomputes o and its norm; writes do [b, t, h, v] (dense), dgate and damount [b, t, h]."""
    NT = tl.cdiv(T, C)
    i, b, h = _place(NT, H)
    ok = tl.arange(0, BK)
    ov = tl.arange(0, BV)
    oc = tl.arange(0, C)
    t = i * C + oc
    inside = (t < T)[:, None] & (ov < V)[None, :]
    live = _live(mask, b, t, T, HAS_MASK)
    row = b * T + t
    s_inside = (ok < K)[:, None] & (ov < V)[None, :]
    s = tl.load(S + ((b * NT + i) * H + h) * K * V + ok[:, None] * V + ov[None, :], mask=s_inside, other=0.0)
    ww = tl.load(w + h * K + ok, mask=ok < K, other=0.0).to(tl.float32)
    _, la, key = _load_gate(z + h * K, row * sz, live, ok, K, ROUND)
    qq = tl.load(q + row[:, None] * sq + h * K + ok[None, :], mask=(t < T)[:, None] & (ok < K)[None, :], other=0.0).to(
        tl.float32
    )
    vv = tl.load(v + row[:, None] * sv + h * V + ov[None, :], mask=inside, other=0.0)
    ids, enter, _, _ = _borders(seg, b, i, t, T, C, HAS_SEG)
    G = tl.cumsum(la, 0)
    Gm = tl.sum(tl.where(oc[:, None] < C // 2, la, 0.0), 0)
    a = _scores(qq, key, G, Gm, ids, oc, DT, PREC)
    o = tl.dot((qq * tl.math.exp2(G) * enter[:, None]).to(DT), s.to(DT), input_precision=PREC)
    o = tl.dot(a.to(DT), vv.to(DT), o, input_precision=PREC) * scale
    amount = tl.sum(qq * key * ww[None, :], 1)
    vf = vv.to(tl.float32)
    sig = tl.sigmoid(amount[:, None] * vf)
    o += sig
    mean = tl.sum(tl.where(inside, o, 0.0), 1) / V
    o = tl.where((ov < V)[None, :], o - mean[:, None], 0.0)
    r = 1.0 / tl.sqrt(tl.sum(o * o, 1) / V + eps)
    n = o * r[:, None]
    gt = tl.load(gate + row[:, None] * sg + h * V + ov[None, :], mask=inside, other=0.0).to(tl.float32)
    up = tl.load(dy + row[:, None] * sy + h * V + ov[None, :], mask=inside, other=0.0).to(tl.float32)
    sgt = tl.sigmoid(gt)
    dense = row[:, None] * (H * V) + h * V + ov[None, :]
    place = row[:, None] * sdg + h * V + ov[None, :]
    tl.store(dgate + place, (up * n * sgt * (1.0 + gt * (1.0 - sgt))).to(dgate.dtype.element_ty), mask=inside)
    dn = up * gt * sgt
    dd = (dn - (tl.sum(dn, 1) / V)[:, None] - n * (tl.sum(dn * n, 1) / V)[:, None]) * r[:, None]
    dd = tl.where(inside, dd, 0.0)
    tl.store(do + dense, dd.to(do.dtype.element_ty), mask=inside)
    tl.store(damount + row * H + h, tl.sum(dd * sig * (1.0 - sig) * vf, 1), mask=t < T)


@triton.jit
def state_backward(
    q, z, do, dS, dht, dh0, keep, seg, mask, sq, sz, scale, PER, T, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr, ROUND: tl.constexpr, HAS_DHT: tl.constexpr, HAS_SEG: tl.constexpr, HAS_MASK: tl.constexpr,
    STORE: tl.constexpr, END: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * V / BV, parts): as `state_forward`, from the last chunk to the first.

    dht [B * H, parts, K, V] is the gradient of the state after each part, dh0 of the one before it; dS [B, NT, H, K, V] of the
    state after each chunk.
    """
    i_v, b, h = _place(tl.cdiv(V, BV), H)
    part = tl.program_id(1)
    mine = (b * H + h) * tl.num_programs(1) + part
    ok = tl.arange(0, BK)
    ov = i_v * BV + tl.arange(0, BV)
    oc = tl.arange(0, C)
    inside = (ok < K)[:, None] & (ov < V)[None, :]
    place = ok[:, None] * V + ov[None, :]
    ds = tl.zeros([BK, BV], tl.float32)
    if HAS_DHT:
        ds += tl.load(dht + mine * K * V + place, mask=inside, other=0.0)
    whole = tl.full([BK], 1.0, tl.float32)
    NT = tl.cdiv(T, C)
    first = part * PER
    stop = tl.minimum(NT, (part + 1) * PER)
    for ii in range(0, stop - first):
        i = stop - 1 - ii
        if STORE:
            tl.store(dS + ((b * NT + i) * H + h) * K * V + place, ds.to(dS.dtype.element_ty), mask=inside)
        t = i * C + oc
        live = _live(mask, b, t, T, HAS_MASK)
        row = b * T + t
        _, la, _ = _load_gate(z + h * K, row * sz, live, ok, K, ROUND)
        qq = tl.load(q + row[:, None] * sq + h * K + ok[None, :], mask=(t < T)[:, None] & (ok < K)[None, :], other=0.0).to(
            tl.float32
        )
        dd = tl.load(do + row[:, None] * (H * V) + h * V + ov[None, :], mask=(t < T)[:, None] & (ov < V)[None, :], other=0.0)
        _, enter, _, carry = _borders(seg, b, i, t, T, C, HAS_SEG)
        G = tl.cumsum(la, 0)
        factor = tl.math.exp2(tl.sum(la, 0)) * carry
        reach = qq * tl.math.exp2(G) * scale * enter[:, None]
        ds = tl.dot(tl.trans(reach.to(DT)), dd.to(DT), ds * factor[:, None], input_precision=PREC)
        whole *= factor
    if END:
        tl.store(dh0 + mine * K * V + place, ds, mask=inside)
    if KEEP:
        tl.store(keep + mine * K + ok, whole, mask=(ok < K) & (i_v == 0))


@triton.jit
def input_backward(
    q, z, v, w, S, dS, do, damount, dq, dz, dv, dw, seg, mask, sq, sz, sv, sdq, sdz, sdv, scale, T, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr, ROUND: tl.constexpr, HAS_SEG: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * chunks). Writes dq, dz [b, t, h, k], dv [b, t, h, v] and per-chunk parts of dw [b, chunks, h, k]."""
    NT = tl.cdiv(T, C)
    i, b, h = _place(NT, H)
    ok = tl.arange(0, BK)
    oc = tl.arange(0, C)
    t = i * C + oc
    here = t < T
    live = _live(mask, b, t, T, HAS_MASK)
    row = b * T + t
    k_inside = here[:, None] & (ok < K)[None, :]
    ww = tl.load(w + h * K + ok, mask=ok < K, other=0.0).to(tl.float32)
    logits, la, key = _load_gate(z + h * K, row * sz, live, ok, K, ROUND)
    qq = tl.load(q + row[:, None] * sq + h * K + ok[None, :], mask=k_inside, other=0.0).to(tl.float32)
    ids, enter, leave, carry = _borders(seg, b, i, t, T, C, HAS_SEG)
    G = tl.cumsum(la, 0)
    Gl = tl.sum(la, 0)
    Gm = tl.sum(tl.where(oc[:, None] < C // 2, la, 0.0), 0)
    amount = tl.sum(qq * key * ww[None, :], 1)
    dam = tl.load(damount + row * H + h, mask=here, other=0.0)
    toward = tl.math.exp2(G - Gm[None, :])
    against = tl.math.exp2(Gm[None, :] - G)
    out = tl.math.exp2(Gl[None, :] - G) * leave[:, None]
    seen = (oc[:, None] >= oc[None, :]) & (ids[:, None] == ids[None, :])
    ST: tl.constexpr = _score_type(DT)
    a = tl.dot((qq * toward).to(ST), tl.trans((key * against).to(ST)), input_precision=PREC)
    a = tl.where(seen, a * scale, 0.0).to(DT)
    da = tl.zeros([C, C], tl.float32)
    dqs = tl.zeros([C, BK], tl.float32)
    dks = tl.zeros([C, BK], tl.float32)
    sds = tl.zeros([BK], tl.float32)
    base = ((b * NT + i) * H + h) * K * V
    for i_v in range(0, tl.cdiv(V, BV)):
        ov = i_v * BV + tl.arange(0, BV)
        v_inside = here[:, None] & (ov < V)[None, :]
        s_inside = (ok < K)[:, None] & (ov < V)[None, :]
        vv = tl.load(v + row[:, None] * sv + h * V + ov[None, :], mask=v_inside, other=0.0)
        dense = row[:, None] * (H * V) + h * V + ov[None, :]
        dd = tl.load(do + dense, mask=v_inside, other=0.0)
        s = tl.load(S + base + ok[:, None] * V + ov[None, :], mask=s_inside, other=0.0)
        ds = tl.load(dS + base + ok[:, None] * V + ov[None, :], mask=s_inside, other=0.0)
        sds += tl.sum(s.to(tl.float32) * ds.to(tl.float32), 1)
        da = tl.dot(dd.to(DT), tl.trans(vv.to(DT)), da, input_precision=PREC)
        dqs = tl.dot(dd.to(DT), tl.trans(s.to(DT)), dqs, input_precision=PREC)
        dks = tl.dot(vv.to(DT), tl.trans(ds.to(DT)), dks, input_precision=PREC)
        dvv = tl.dot(tl.trans(a), dd.to(DT), input_precision=PREC)
        dvv = tl.dot((key * out).to(DT), ds.to(DT), dvv, input_precision=PREC)
        vf = vv.to(tl.float32)
        sig = tl.sigmoid(amount[:, None] * vf)
        dvv += dd.to(tl.float32) * sig * (1.0 - sig) * amount[:, None]
        tl.store(dv + row[:, None] * sdv + h * V + ov[None, :], dvv.to(dv.dtype.element_ty), mask=v_inside)
    da = tl.where(seen, da * scale, 0.0).to(ST)
    dki = dks * out
    dqq = tl.dot(da, (key * against).to(ST), input_precision=PREC) * toward
    dqq += dqs * tl.math.exp2(G) * scale * enter[:, None]
    dkk = tl.dot(tl.trans(da), (qq * toward).to(ST), input_precision=PREC) * against + dki
    tail = tl.math.exp2(Gl) * carry * sds + tl.sum(key * dki, 0)  # <state after, its gradient>: all that lies after this chunk
    dla = tl.cumsum(qq * dqq - key * dkk, 0, reverse=True) + tail[None, :]
    dqq += dam[:, None] * key * ww[None, :]
    dkk += dam[:, None] * qq * ww[None, :]
    dla -= (1.0 - key) * dkk  # the key is 1 - decay
    dzz = tl.where(live[:, None] & (logits >= LOWEST), dla * 0.0625 * tl.sigmoid(-logits), 0.0)
    at = h * K + ok[None, :]
    tl.store(dq + row[:, None] * sdq + at, dqq.to(dq.dtype.element_ty), mask=k_inside)
    tl.store(dz + row[:, None] * sdz + at, dzz.to(dz.dtype.element_ty), mask=k_inside)
    tl.store(dw + ((b * NT + i) * H + h) * K + ok, tl.sum(dam[:, None] * qq * key, 0), mask=ok < K)
