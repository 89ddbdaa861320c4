"""Triton kernels of the short causal depthwise convolution, channels last: forward, one-kernel backward, decode step.

The formula and its plain form are in `ops/conv.py`. Shifted rows are read again instead of being kept: they lie in the cache.
The backward forms the sum before the activation again for each of the W tokens that a row reaches, so that dx, dbias and the
parts of dW come out of one pass over x and dy. Document boundaries come as segment ids; what lies before the sequence is the
history, or zero.
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
        tap = tl.load(weight + oc * W + (W - 1 - shift), mask=oc < D, other=0.0).to(tl.float32)
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
def conv_backward(
    x, weight, bias, gate, hist, seg, dy, dx, dw, db, dgate, T, D, sx, sg, sy,
    W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, HAS_HIST: tl.constexpr, HAS_SEG: tl.constexpr,
):  # fmt: skip
    """Grid (B * T / BT, D / BD). dx [B, T, D]; parts of dw [B, tiles, W, D] (W by shift) and db [B, tiles, D]; dgate [B, T, D]."""
    NT = tl.cdiv(T, BT)
    t = tl.program_id(0) % NT * BT + tl.arange(0, BT)
    oc = tl.program_id(1) * BD + tl.arange(0, BD)
    b = (tl.program_id(0) // NT).to(tl.int64)
    inside = (t < T)[:, None] & (oc < D)[None, :]
    part = tl.program_id(0).to(tl.int64)
    total_dx = tl.zeros([BT, BD], tl.float32)
    for shift in tl.static_range(W):
        later = t + shift  # the token whose sum reads x_t through this tap
        there = (later < T)[:, None] & (oc < D)[None, :]
        up = tl.load(dy + (b * T + later)[:, None] * sy + oc[None, :], mask=there, other=0.0).to(tl.float32)
        z = _total(x, weight, bias, hist, seg, b, later, oc, T, D, sx, W, HAS_BIAS, HAS_HIST, HAS_SEG, BT, BD)
        sig = tl.sigmoid(z)
        if HAS_GATE:
            g = tl.load(gate + (b * T + later)[:, None] * sg + oc[None, :], mask=there, other=0.0).to(tl.float32)
            if shift == 0:
                act = z * sig if SILU else z
                tl.store(dgate + (b * T + t)[:, None] * D + oc[None, :], (up * act).to(dgate.dtype.element_ty), mask=inside)
            up *= g
        dz = up * sig * (1.0 + z * (1.0 - sig)) if SILU else up
        if shift == 0:
            for s in tl.static_range(W):
                value = _tap(x, hist, seg, b, t, s, oc, T, D, sx, W, HAS_HIST, HAS_SEG)
                tl.store(dw + (part * W + s) * D + oc, tl.sum(dz * value, 0), mask=oc < D)
            if HAS_BIAS:
                tl.store(db + part * D + oc, tl.sum(dz, 0), mask=oc < D)
        if HAS_SEG:
            here = tl.load(seg + b * T + t, mask=t < T, other=0)
            then = tl.load(seg + b * T + later, mask=later < T, other=-1)
            dz = tl.where((here == then)[:, None], dz, 0.0)
        tap = tl.load(weight + oc * W + (W - 1 - shift), mask=oc < D, other=0.0).to(tl.float32)
        total_dx += dz * tap[None, :]
    tl.store(dx + (b * T + t)[:, None] * D + oc[None, :], total_dx.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def conv_step(
    x,
    weight,
    bias,
    state,
    slots,
    y,
    D,
    sx,
    W: tl.constexpr,
    BD: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
):
    """Grid (B, D / BD): one token per row; the window state [slots, W - 1, D] is shifted in place."""
    b = tl.program_id(0).to(tl.int64)
    oc = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = oc < D
    slot = b
    if HAS_SLOTS:
        slot = tl.load(slots + b).to(tl.int64)
    window = state + slot * (W - 1) * D + oc
    now = tl.load(x + b * sx + oc, mask=inside, other=0.0)
    total = now.to(tl.float32) * tl.load(weight + oc * W + W - 1, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + oc, mask=inside, other=0.0).to(tl.float32)
    for j in tl.static_range(W - 1):
        old = tl.load(window + j * D, mask=inside, other=0.0)
        total += old.to(tl.float32) * tl.load(weight + oc * W + j, mask=inside, other=0.0).to(tl.float32)
        # a thread may hold other channels of row j than of row j - 1 (the compiler picks vector widths row by row): a row is
        # written after all threads have read it
        tl.debug_barrier()
        if j > 0:
            tl.store(window + (j - 1) * D, old, mask=inside)
    tl.store(window + (W - 2) * D, now.to(state.dtype.element_ty), mask=inside)
    if SILU:
        total = total * tl.sigmoid(total)
    tl.store(y + b * D + oc, total.to(y.dtype.element_ty), mask=inside)
