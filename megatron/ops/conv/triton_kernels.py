"""Triton kernels of the short causal depthwise convolution, channels last: forward, one-kernel backward, decode step.

The formula and its plain form are in `ops/conv/operator.py`; weights come tap by tap, [W, D]. The forward reads shifted rows
again instead of keeping them: they lie in the cache. The backward walks over a tile of rows from the last to the first, with the
last rows of x and of the gradient before the activation in registers: every row is read once and each sum is formed once. It is
written for four taps; with fewer the earliest are zero. Document boundaries come as segment ids; what lies before the sequence is
the history, or zero.
"""

import triton
import triton.language as tl


@triton.jit
def _tap(x, hist, seg, b, t, shift, oc, T, D, sx, W: tl.constexpr, HAS_HIST: tl.constexpr, HAS_SEG: tl.constexpr):
    """x at `shift` tokens before t, [BT, BD] in fp32: 0 outside the sequence and beyond a document boundary."""
    at = t - shift
    now = (t >= 0) & (t < T)
    value = tl.load(
        x + (b * T + at)[:, None] * sx + oc[None, :], mask=(now & (at >= 0))[:, None] & (oc < D)[None, :], other=0.0
    )
    value = value.to(tl.float32)
    if HAS_HIST:
        place = b * (W - 1) + W - 1 + at
        old = tl.load(hist + place[:, None] * D + oc[None, :], mask=(now & (at < 0))[:, None] & (oc < D)[None, :], other=0.0)
        value += old.to(tl.float32)
    if HAS_SEG:
        here = tl.load(seg + b * T + t, mask=now, other=0)
        there = tl.load(seg + b * T + tl.maximum(at, 0), mask=now, other=0)
        value = tl.where((here == there)[:, None], value, 0.0)
    return value


@triton.jit
def _total(
    x,
    weight,
    bias,
    hist,
    seg,
    b,
    t,
    oc,
    T,
    D,
    sx,
    W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_HIST: tl.constexpr,
    HAS_SEG: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """The sum before the activation at tokens t, [BT, BD]."""
    total = tl.zeros([BT, BD], tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + oc, mask=oc < D, other=0.0).to(tl.float32)[None, :]
    for shift in tl.static_range(W):
        tap = tl.load(weight + (W - 1 - shift) * D + oc, mask=oc < D, other=0.0).to(tl.float32)
        total += _tap(x, hist, seg, b, t, shift, oc, T, D, sx, W, HAS_HIST, HAS_SEG) * tap[None, :]
    return total


@triton.jit
def conv_forward(
    x, weight, bias, gate, hist, seg, y, T, D, sx, sg,
    W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, HAS_HIST: tl.constexpr, HAS_SEG: tl.constexpr,
):  # fmt: skip
    """Grid (B * T / BT, D / BD)."""
    NT = tl.cdiv(T, BT)
    t = tl.program_id(0) % NT * BT + tl.arange(0, BT)
    oc = tl.program_id(1) * BD + tl.arange(0, BD)
    b = (tl.program_id(0) // NT).to(tl.int64)
    inside = (t < T)[:, None] & (oc < D)[None, :]
    total = _total(x, weight, bias, hist, seg, b, t, oc, T, D, sx, W, HAS_BIAS, HAS_HIST, HAS_SEG, BT, BD)
    if SILU:
        total = total * tl.sigmoid(total)
    if HAS_GATE:
        total *= tl.load(gate + (b * T + t)[:, None] * sg + oc[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(y + (b * T + t)[:, None] * D + oc[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _row(x, hist, b, t, oc, T, D, sx, W: tl.constexpr, HAS_HIST: tl.constexpr):
    """Row t of x, [BD] in fp32: the history before the sequence, 0 outside of both."""
    value = tl.load(x + (b * T + t) * sx + oc, mask=(oc < D) & (t >= 0) & (t < T), other=0.0).to(tl.float32)
    if HAS_HIST:
        place = hist + (b * (W - 1) + W - 1 + t) * D + oc
        value += tl.load(place, mask=(oc < D) & (t < 0) & (t > -W), other=0.0).to(tl.float32)
    return value


@triton.jit
def _document(seg, b, t, T, HAS_SEG: tl.constexpr):
    """Number of the document of token t; the history belongs to the first one."""
    if HAS_SEG:
        return tl.load(seg + b * T + tl.minimum(tl.maximum(t, 0), T - 1))
    return 0


@triton.jit
def _within(value, one, other, HAS_SEG: tl.constexpr):
    """`value` where both tokens belong to one document, else 0."""
    if HAS_SEG:
        return tl.where(one == other, value, 0.0)
    return value


@triton.jit
def conv_backward(
    x, weight, bias, gate, hist, seg, dy, dx, dw, db, dgate, T, D, sx, sg, sy,
    W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, U: tl.constexpr, SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, HAS_HIST: tl.constexpr, HAS_SEG: tl.constexpr,
):  # fmt: skip
    """Grid (B * T / BT, D / BD). dx, dgate [B, T, D]; parts of dw [B, tiles, 4, D] (tap 3 is the current token), db [B, tiles, D].

    weight [4, D]; U rows are unrolled and must divide BT + 3.
    """
    NT = tl.cdiv(T, BT)
    first = tl.program_id(0) % NT * BT
    b = (tl.program_id(0) // NT).to(tl.int64)
    oc = tl.program_id(1) * BD + tl.arange(0, BD)
    ok = oc < D
    w0 = tl.load(weight + oc, mask=ok, other=0.0).to(tl.float32)
    w1 = tl.load(weight + D + oc, mask=ok, other=0.0).to(tl.float32)
    w2 = tl.load(weight + 2 * D + oc, mask=ok, other=0.0).to(tl.float32)
    w3 = tl.load(weight + 3 * D + oc, mask=ok, other=0.0).to(tl.float32)
    shift = tl.zeros([BD], tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + oc, mask=ok, other=0.0).to(tl.float32)
    g0 = tl.zeros([BD], tl.float32)
    g1 = g0
    g2 = g0
    g3 = g0
    gb = g0
    d1 = g0  # gradients of the sums of the next three tokens
    d2 = g0
    d3 = g0
    top = first + BT + 2
    x0 = _row(x, hist, b, top, oc, T, D, sx, W, HAS_HIST)
    x1 = _row(x, hist, b, top - 1, oc, T, D, sx, W, HAS_HIST)
    x2 = _row(x, hist, b, top - 2, oc, T, D, sx, W, HAS_HIST)
    e0 = _document(seg, b, top, T, HAS_SEG)
    e1 = _document(seg, b, top - 1, T, HAS_SEG)
    e2 = _document(seg, b, top - 2, T, HAS_SEG)
    f1 = e0
    f2 = e0
    f3 = e0
    for n in range(0, BT + 3, U):
        for u in tl.static_range(U):
            t = top - n - u
            x3 = _row(x, hist, b, t - 3, oc, T, D, sx, W, HAS_HIST)
            e3 = _document(seg, b, t - 3, T, HAS_SEG)
            y1 = _within(x1, e0, e1, HAS_SEG)
            y2 = _within(x2, e0, e2, HAS_SEG)
            y3 = _within(x3, e0, e3, HAS_SEG)
            s = shift + x0 * w3 + y1 * w2 + y2 * w1 + y3 * w0
            there = ok & (t < T)
            own = there & (t < first + BT)
            up = tl.load(dy + (b * T + t) * sy + oc, mask=there, other=0.0).to(tl.float32)
            root = tl.math.rsqrt(1.0 + tl.math.exp2(-s * 1.4426950408889634))
            sig = root * root
            if HAS_GATE:
                act = s * sig if SILU else s
                tl.store(dgate + (b * T + t) * D + oc, (up * act).to(dgate.dtype.element_ty), mask=own)
                up *= tl.load(gate + (b * T + t) * sg + oc, mask=there, other=0.0).to(tl.float32)
            dz = up * sig * (1.0 + s * (1.0 - sig)) if SILU else up
            mine = tl.where(own, dz, 0.0)
            g3 += mine * x0
            g2 += mine * y1
            g1 += mine * y2
            g0 += mine * y3
            gb += mine
            back = dz * w3 + _within(d1, e0, f1, HAS_SEG) * w2 + _within(d2, e0, f2, HAS_SEG) * w1
            back += _within(d3, e0, f3, HAS_SEG) * w0
            tl.store(dx + (b * T + t) * D + oc, back.to(dx.dtype.element_ty), mask=own)
            d3 = d2
            d2 = d1
            d1 = dz
            x0 = x1
            x1 = x2
            x2 = x3
            f3 = f2
            f2 = f1
            f1 = e0
            e0 = e1
            e1 = e2
            e2 = e3
    place = tl.program_id(0).to(tl.int64) * 4 * D + oc
    tl.store(dw + place, g0, mask=ok)
    tl.store(dw + place + D, g1, mask=ok)
    tl.store(dw + place + 2 * D, g2, mask=ok)
    tl.store(dw + place + 3 * D, g3, mask=ok)
    if HAS_BIAS:
        tl.store(db + tl.program_id(0).to(tl.int64) * D + oc, gb, mask=ok)


@triton.jit
def conv_step(
    x,
    weight,
    bias,
    gate,
    state,
    slots,
    y,
    D,
    sx,
    sg,
    ss,
    W: tl.constexpr,
    BD: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
):
    """Grid (B, D / BD): one token per row; the window state [slots, W - 1, D], rows `ss` apart, is shifted in place."""
    b = tl.program_id(0).to(tl.int64)
    oc = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = oc < D
    slot = b
    if HAS_SLOTS:
        slot = tl.load(slots + b).to(tl.int64)
    window = state + slot * ss + oc
    now = tl.load(x + b * sx + oc, mask=inside, other=0.0)
    total = now.to(tl.float32) * tl.load(weight + (W - 1) * D + oc, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + oc, mask=inside, other=0.0).to(tl.float32)
    for j in tl.static_range(W - 1):
        old = tl.load(window + j * D, mask=inside, other=0.0)
        total += old.to(tl.float32) * tl.load(weight + j * D + oc, mask=inside, other=0.0).to(tl.float32)
        # a thread may hold other channels of row j than of row j - 1 (the compiler picks vector widths row by row): a row is
        # written after all threads have read it
        tl.debug_barrier()
        if j > 0:
            tl.store(window + (j - 1) * D, old, mask=inside)
    tl.store(window + (W - 2) * D, now.to(state.dtype.element_ty), mask=inside)
    if SILU:
        total = total * tl.sigmoid(total)
    if HAS_GATE:
        total *= tl.load(gate + b * sg + oc, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + b * D + oc, total.to(y.dtype.element_ty), mask=inside)
