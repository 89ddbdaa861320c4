"""Triton kernels of MetaLA's states: they walk over the chunks of a sequence, forward and backward.

What they multiply comes from `gate_forward`; the head of `triton_kernels.py` explains it. The kernels are sequential; where
batch x heads is too small to fill a GPU they run twice on parts of the sequence side by side: once from zero for what each part
adds and what it leaves of its start, and, after `join_parts` has put these one behind the other, once more from the right
starts. Decay is per channel, so a part's effect on its start is one factor per key channel.
"""

import triton
import triton.language as tl

from megatron.ops.metala.triton_kernels import _borders, _place, _scaled


@triton.jit
def state_forward(
    ks, v, GL, GM, S, h0, ht, keep, seg, sv, PER, T, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr, HAS_H0: tl.constexpr, HAS_SEG: tl.constexpr,
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
        chunk = (b * NT + i) * H + h
        if STORE:
            tl.store(S + chunk * K * V + place, s.to(S.dtype.element_ty), mask=inside)
        t = i * C + oc
        row = b * T + t
        _, _, leave, carry = _borders(seg, b, i, t, T, C, HAS_SEG)
        kk = tl.load(ks + row[:, None] * (H * K) + h * K + ok[None, :], mask=leave[:, None] & (ok < K)[None, :], other=0.0)
        vv = tl.load(v + row[:, None] * sv + h * V + ov[None, :], mask=(t < T)[:, None] & (ov < V)[None, :], other=0.0)
        last = tl.load(GL + chunk * K + ok, mask=ok < K, other=0.0)
        factor = tl.math.exp2(last) * carry
        after = tl.math.exp2(last - tl.load(GM + chunk * K + ok, mask=ok < K, other=0.0))
        if kk.dtype == DT:  # as stored, without a pass through registers
            s = s * factor[:, None] + tl.dot(tl.trans(kk), vv, input_precision=PREC) * after[:, None]
        else:
            s = tl.dot(tl.trans(_scaled(kk, after, DT)), vv, s * factor[:, None], input_precision=PREC)
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
def state_backward(
    qs, do, GL, GM, dS, dht, dh0, keep, seg, scale, PER, T, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr, HAS_DHT: tl.constexpr, HAS_SEG: tl.constexpr,
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
        chunk = (b * NT + i) * H + h
        if STORE:
            tl.store(dS + chunk * K * V + place, ds.to(dS.dtype.element_ty), mask=inside)
        t = i * C + oc
        row = b * T + t
        _, enter, _, carry = _borders(seg, b, i, t, T, C, HAS_SEG)
        qq = tl.load(qs + row[:, None] * (H * K) + h * K + ok[None, :], mask=enter[:, None] & (ok < K)[None, :], other=0.0)
        dd = tl.load(do + row[:, None] * (H * V) + h * V + ov[None, :], mask=(t < T)[:, None] & (ov < V)[None, :], other=0.0)
        factor = tl.math.exp2(tl.load(GL + chunk * K + ok, mask=ok < K, other=0.0)) * carry
        middle = tl.math.exp2(tl.load(GM + chunk * K + ok, mask=ok < K, other=0.0)) * scale
        if qq.dtype == DT:
            ds = ds * factor[:, None] + tl.dot(tl.trans(qq), dd, input_precision=PREC) * middle[:, None]
        else:
            ds = tl.dot(tl.trans(_scaled(qq, middle, DT)), dd, ds * factor[:, None], input_precision=PREC)
        whole *= factor
    if END:
        tl.store(dh0 + mine * K * V + place, ds, mask=inside)
    if KEEP:
        tl.store(keep + mine * K + ok, whole, mask=(ok < K) & (i_v == 0))
