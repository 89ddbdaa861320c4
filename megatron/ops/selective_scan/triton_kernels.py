"""Triton kernels of the selective scan: forward, backward, and the first pass of a sequence that is split into parts.

A program is one warp. It walks over the tokens of its channels, four at a time, with the states in registers: a tile
[RN, RC, LN, LC] in fp32, whose first two dimensions lie in the registers of a thread and whose last two are the lanes of the
warp. State `ln * RN + rn` of channel `lc * RC + rc` is element (rn, rc, ln, lc): so the sums over states (the output, the
gradients of u and dt) and those over channels (the gradients of B and C) are mostly sums within a thread, and what a thread
reads is dense. A row of channels is [1, RC, LN, LC], the same for every ln; a row of states [RN, 1, LN, LC].

The forward stores the state before every CHUNK tokens. The backward walks over the chunks from the last to the first: it goes
through a chunk once to store the state before every fourth token in a scratch of its own, then takes four tokens at a time from
the last. Sums over channels leave as one partial sum per block of channels, without atomics.

A sequence in parts (few long sequences): `part_ends` walks over each part from an empty state, `part_gradients` from its end
without a gradient; whoever needs the state before a part, or the gradient after it, joins those of the other parts.

Shapes: u, dt, y [B, T, D]; b, c [B, T, N]; a [D, N]; states [B, D, N]. `same [B, T]` is 0 where a document begins, else 1.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _channels(first, RC: tl.constexpr, LN: tl.constexpr, LC: tl.constexpr):
    """Numbers of the channels of a row, [1, RC, LN, LC]."""
    rc = tl.arange(0, RC)[None, :, None, None]
    lc = tl.arange(0, LC)[None, None, None, :]
    return tl.broadcast_to(first + lc * RC + rc, (1, RC, LN, LC))


@triton.jit
def _numbers(RN: tl.constexpr, LN: tl.constexpr, LC: tl.constexpr):
    """Numbers of the states of a channel, [RN, 1, LN, LC]."""
    numbers = tl.arange(0, LN)[None, None, :, None] * RN + tl.arange(0, RN)[:, None, None, None]
    return tl.broadcast_to(numbers, (RN, 1, LN, LC))


@triton.jit
def _rows(x, stride, place, inside, left):
    """Four consecutive rows of x in fp32; those beyond the `left` tokens that there are, are 0."""
    x0 = tl.load(x + place, mask=inside & (left > 0), other=0.0)
    x1 = tl.load(x + stride + place, mask=inside & (left > 1), other=0.0)
    x2 = tl.load(x + 2 * stride + place, mask=inside & (left > 2), other=0.0)
    x3 = tl.load(x + 3 * stride + place, mask=inside & (left > 3), other=0.0)
    return x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)


@triton.jit
def _same(same, row, left, HAS_SEG: tl.constexpr):
    """Whether each of four tokens belongs to the document of the one before it: 1 or 0."""
    if HAS_SEG:
        s0 = tl.load(same + row, mask=left > 0, other=1.0)
        s1 = tl.load(same + row + 1, mask=left > 1, other=1.0)
        s2 = tl.load(same + row + 2, mask=left > 2, other=1.0)
        s3 = tl.load(same + row + 3, mask=left > 3, other=1.0)
        return s0, s1, s2, s3
    return 1.0, 1.0, 1.0, 1.0


@triton.jit
def _over_states(x):
    """[1, RC, 1, LC]: the sum over the states of each channel."""
    return tl.sum(tl.sum(x, 0, keep_dims=True), 2, keep_dims=True)


@triton.jit
def _over_channels(x):
    """[RN, 1, LN, 1]: the sum over the channels of the block."""
    return tl.sum(tl.sum(x, 1, keep_dims=True), 3, keep_dims=True)


@triton.jit
def _store_row(x, place, value, mask, RC: tl.constexpr, LN: tl.constexpr, LC: tl.constexpr):
    """Store a row of channels, whose copies lie in all lanes of a channel; `mask` picks one of them."""
    tl.store(x + place, tl.broadcast_to(value, (1, RC, LN, LC)).to(x.dtype.element_ty), mask=mask)


@triton.jit
def _store_numbers(x, place, value, mask, RN: tl.constexpr, LN: tl.constexpr, LC: tl.constexpr):
    """Store a row of states, whose copies lie in all lanes of a state; `mask` picks one of them."""
    tl.store(x + place, tl.broadcast_to(value, (RN, 1, LN, LC)), mask=mask)


@triton.jit
def scan_forward(
    u, dt, a, b, c, same, h0, ends, factors, y, borders, last,
    T, D, su, sdt, sb, sc, PER, PARTS,
    N: tl.constexpr, HAS_SEG: tl.constexpr, HAS_H0: tl.constexpr, KEEP: tl.constexpr, SPLIT: tl.constexpr,
    CHUNK: tl.constexpr, RN: tl.constexpr, RC: tl.constexpr, LN: tl.constexpr, LC: tl.constexpr,
):  # fmt: skip
    """Grid (B * blocks of channels, PARTS). y in fp32; with KEEP the state before each chunk, borders [B, T / CHUNK, D, N];
    last [B, D, N] after the last token. With SPLIT a part, PER chunks, begins from the joined `ends` and `factors`
    [PARTS, B, D, N] of those before it."""
    blocks = tl.cdiv(D, RC * LC)
    part = tl.program_id(1)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * (RC * LC)
    oc = _channels(first, RC, LN, LC)
    on = _numbers(RN, LN, LC)
    live, tile = oc < D, (oc < D) & (on < N)
    at = oc * N + on
    a2 = tl.load(a + at, mask=tile, other=0.0).to(tl.float32) * LOG2_E
    h = tl.zeros([RN, RC, LN, LC], tl.float32)
    if HAS_H0:
        h = tl.load(h0 + batch * D * N + at, mask=tile, other=0.0)
    if SPLIT:
        for i in range(part):
            place = (i * (tl.num_programs(0) // blocks) + batch) * D * N + at
            h = h * tl.load(factors + place, mask=tile, other=0.0) + tl.load(ends + place, mask=tile, other=0.0)
    begin = part * PER * CHUNK
    stop = tl.minimum(T, begin + PER * CHUNK)
    write = live & (tl.arange(0, LN)[None, None, :, None] == 0)
    row = batch * T + begin
    d0, d1, d2, d3 = _rows(dt + row * sdt, sdt, oc, live, stop - begin)
    u0, u1, u2, u3 = _rows(u + row * su, su, oc, live, stop - begin)
    for t in range(begin, stop, 4):
        row = batch * T + t
        left = stop - t
        e0, e1, e2, e3 = _rows(dt + (row + 4) * sdt, sdt, oc, live, left - 4)  # on their way while this turn computes
        v0, v1, v2, v3 = _rows(u + (row + 4) * su, su, oc, live, left - 4)
        if KEEP:  # noqa: SIM102 -- the outer one is decided while compiling
            if t % CHUNK == 0:
                tl.store(borders + (batch * tl.cdiv(T, CHUNK) + t // CHUNK) * D * N + at, h, mask=tile)
        b0, b1, b2, b3 = _rows(b + row * sb, sb, on, on < N, left)
        c0, c1, c2, c3 = _rows(c + row * sc, sc, on, on < N, left)
        s0, s1, s2, s3 = _same(same, row, left, HAS_SEG)
        h = h * (tl.math.exp2(d0 * a2) * s0) + (d0 * u0) * b0
        y0 = _over_states(h * c0)
        h = h * (tl.math.exp2(d1 * a2) * s1) + (d1 * u1) * b1
        y1 = _over_states(h * c1)
        h = h * (tl.math.exp2(d2 * a2) * s2) + (d2 * u2) * b2
        y2 = _over_states(h * c2)
        h = h * (tl.math.exp2(d3 * a2) * s3) + (d3 * u3) * b3
        y3 = _over_states(h * c3)
        out = y + row * D
        _store_row(out, oc, y0, write & (left > 0), RC, LN, LC)
        _store_row(out + D, oc, y1, write & (left > 1), RC, LN, LC)
        _store_row(out + 2 * D, oc, y2, write & (left > 2), RC, LN, LC)
        _store_row(out + 3 * D, oc, y3, write & (left > 3), RC, LN, LC)
        d0, d1, d2, d3 = e0, e1, e2, e3
        u0, u1, u2, u3 = v0, v1, v2, v3
    if part == PARTS - 1:
        tl.store(last + batch * D * N + at, h, mask=tile)


@triton.jit
def part_ends(
    u, dt, a, b, same, ends, factors, T, D, su, sdt, sb, PER,
    N: tl.constexpr, HAS_SEG: tl.constexpr,
    CHUNK: tl.constexpr, RN: tl.constexpr, RC: tl.constexpr, LN: tl.constexpr, LC: tl.constexpr,
):  # fmt: skip
    """Grid (B * blocks of channels, PARTS - 1). The state after each part from an empty one, and the decay across the part."""
    blocks = tl.cdiv(D, RC * LC)
    part = tl.program_id(1)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    oc = _channels(tl.program_id(0) % blocks * (RC * LC), RC, LN, LC)
    on = _numbers(RN, LN, LC)
    live, tile = oc < D, (oc < D) & (on < N)
    at = oc * N + on
    a2 = tl.load(a + at, mask=tile, other=0.0).to(tl.float32) * LOG2_E
    h = tl.zeros([RN, RC, LN, LC], tl.float32)
    total = tl.zeros([1, RC, LN, LC], tl.float32)
    unbroken = 1.0
    begin = part * PER * CHUNK
    stop = tl.minimum(T, begin + PER * CHUNK)
    for t in range(begin, stop, 4):
        row = batch * T + t
        left = stop - t
        d0, d1, d2, d3 = _rows(dt + row * sdt, sdt, oc, live, left)
        u0, u1, u2, u3 = _rows(u + row * su, su, oc, live, left)
        b0, b1, b2, b3 = _rows(b + row * sb, sb, on, on < N, left)
        s0, s1, s2, s3 = _same(same, row, left, HAS_SEG)
        h = h * (tl.math.exp2(d0 * a2) * s0) + (d0 * u0) * b0
        h = h * (tl.math.exp2(d1 * a2) * s1) + (d1 * u1) * b1
        h = h * (tl.math.exp2(d2 * a2) * s2) + (d2 * u2) * b2
        h = h * (tl.math.exp2(d3 * a2) * s3) + (d3 * u3) * b3
        total += (d0 + d1) + (d2 + d3)
        unbroken = unbroken * s0 * s1 * s2 * s3
    place = (part * (tl.num_programs(0) // blocks) + batch) * D * N + at
    tl.store(ends + place, h, mask=tile)
    tl.store(factors + place, tl.math.exp2(total * a2) * unbroken, mask=tile)


@triton.jit
def part_gradients(
    dy, dt, a, c, same, ends, factors, T, D, sdy, sdt, sc, PER,
    N: tl.constexpr, HAS_SEG: tl.constexpr,
    CHUNK: tl.constexpr, RN: tl.constexpr, RC: tl.constexpr, LN: tl.constexpr, LC: tl.constexpr,
):  # fmt: skip
    """Grid (B * blocks of channels, PARTS - 1). For parts from the second: the gradient of the state before the part from that
    part's outputs, and the decay across it, in places 1 .. PARTS - 1 of `ends` and `factors`."""
    blocks = tl.cdiv(D, RC * LC)
    part = tl.program_id(1) + 1
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    oc = _channels(tl.program_id(0) % blocks * (RC * LC), RC, LN, LC)
    on = _numbers(RN, LN, LC)
    live, tile = oc < D, (oc < D) & (on < N)
    at = oc * N + on
    a2 = tl.load(a + at, mask=tile, other=0.0).to(tl.float32) * LOG2_E
    g = tl.zeros([RN, RC, LN, LC], tl.float32)
    total = tl.zeros([1, RC, LN, LC], tl.float32)
    unbroken = 1.0
    begin = part * PER * CHUNK
    stop = tl.minimum(T, begin + PER * CHUNK)
    steps = tl.cdiv(stop - begin, 4)
    for i in range(steps):
        t = begin + (steps - 1 - i) * 4
        row = batch * T + t
        left = stop - t
        d0, d1, d2, d3 = _rows(dt + row * sdt, sdt, oc, live, left)
        y0, y1, y2, y3 = _rows(dy + row * sdy, sdy, oc, live, left)
        c0, c1, c2, c3 = _rows(c + row * sc, sc, on, on < N, left)
        s0, s1, s2, s3 = _same(same, row, left, HAS_SEG)
        g = (g + y3 * c3) * (tl.math.exp2(d3 * a2) * s3)
        g = (g + y2 * c2) * (tl.math.exp2(d2 * a2) * s2)
        g = (g + y1 * c1) * (tl.math.exp2(d1 * a2) * s1)
        g = (g + y0 * c0) * (tl.math.exp2(d0 * a2) * s0)
        total += (d0 + d1) + (d2 + d3)
        unbroken = unbroken * s0 * s1 * s2 * s3
    place = (part * (tl.num_programs(0) // blocks) + batch) * D * N + at
    tl.store(ends + place, g, mask=tile)
    tl.store(factors + place, tl.math.exp2(total * a2) * unbroken, mask=tile)


@triton.jit
def _token_back(g, da, decay, part, u, dt, b, c, dy, a2):
    """One token of the backward. part: what is left of the state before the token; g: gradient of the state after it from later
    tokens. Returns g and da (sums so far) before the token, and the gradients of u, dt, b, c."""
    g = g + dy * c
    x = dt * u
    dc = _over_channels(dy * (part + x * b))
    db = _over_channels(g * x)
    through = _over_states(g * b)
    exponent = g * part
    ddt = _over_states(exponent * a2) * (1.0 / LOG2_E) + through * u
    return g * decay, da + exponent * dt, through * dt, ddt, db, dc


@triton.jit
def scan_backward(
    dy, dlast, u, dt, a, b, c, same, borders, ends, factors, scratch, du, ddt, da, db, dc, dh0,
    T, D, sdy, su, sdt, sb, sc, PER, PARTS,
    N: tl.constexpr, HAS_SEG: tl.constexpr, HAS_LAST: tl.constexpr, SPLIT: tl.constexpr,
    CHUNK: tl.constexpr, RN: tl.constexpr, RC: tl.constexpr, LN: tl.constexpr, LC: tl.constexpr,
):  # fmt: skip
    """Grid (B * blocks of channels, PARTS). du, ddt [B, T, D]; da [PARTS, B, D, N]; db, dc [blocks, B, T, N]; dh0 [B, D, N]."""
    blocks = tl.cdiv(D, RC * LC)
    BATCH = tl.num_programs(0) // blocks
    part = tl.program_id(1)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    block = (tl.program_id(0) % blocks).to(tl.int64)
    oc = _channels(tl.program_id(0) % blocks * (RC * LC), RC, LN, LC)
    on = _numbers(RN, LN, LC)
    live, tile, number = oc < D, (oc < D) & (on < N), on < N
    at = oc * N + on
    a2 = tl.load(a + at, mask=tile, other=0.0).to(tl.float32) * LOG2_E
    g = tl.zeros([RN, RC, LN, LC], tl.float32)
    if HAS_LAST:
        g = tl.load(dlast + batch * D * N + at, mask=tile, other=0.0)
    if SPLIT:
        for i in range(PARTS - 1 - part):
            place = ((PARTS - 1 - i) * BATCH + batch) * D * N + at
            g = g * tl.load(factors + place, mask=tile, other=0.0) + tl.load(ends + place, mask=tile, other=0.0)
    grad_a = tl.zeros([RN, RC, LN, LC], tl.float32)
    SIZE: tl.constexpr = RN * RC * LN * LC
    own = scratch + (part * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * (CHUNK // 4 * SIZE)
    own += _channels(0, RC, LN, LC) * (RN * LN) + on
    write = live & (tl.arange(0, LN)[None, None, :, None] == 0)
    one = number & (tl.arange(0, LC)[None, None, None, :] == 0)
    begin = part * PER
    chunks = tl.minimum(tl.cdiv(T, CHUNK), begin + PER) - begin
    for n in range(chunks):
        chunk = begin + chunks - 1 - n
        steps = tl.cdiv(tl.minimum(T - chunk * CHUNK, CHUNK), 4)
        h = tl.load(borders + (batch * tl.cdiv(T, CHUNK) + chunk) * D * N + at, mask=tile, other=0.0)
        row = batch * T + chunk * CHUNK
        d0, d1, d2, d3 = _rows(dt + row * sdt, sdt, oc, live, T - chunk * CHUNK)
        u0, u1, u2, u3 = _rows(u + row * su, su, oc, live, T - chunk * CHUNK)
        for i in range(steps):
            t = chunk * CHUNK + i * 4
            row = batch * T + t
            left = T - t
            e0, e1, e2, e3 = _rows(dt + (row + 4) * sdt, sdt, oc, live, left - 4)
            v0, v1, v2, v3 = _rows(u + (row + 4) * su, su, oc, live, left - 4)
            tl.store(own + i * SIZE, h)
            b0, b1, b2, b3 = _rows(b + row * sb, sb, on, number, left)
            s0, s1, s2, s3 = _same(same, row, left, HAS_SEG)
            h = h * (tl.math.exp2(d0 * a2) * s0) + (d0 * u0) * b0
            h = h * (tl.math.exp2(d1 * a2) * s1) + (d1 * u1) * b1
            h = h * (tl.math.exp2(d2 * a2) * s2) + (d2 * u2) * b2
            h = h * (tl.math.exp2(d3 * a2) * s3) + (d3 * u3) * b3
            d0, d1, d2, d3 = e0, e1, e2, e3
            u0, u1, u2, u3 = v0, v1, v2, v3
        tl.debug_barrier()
        for i in range(steps):
            t = chunk * CHUNK + (steps - 1 - i) * 4
            row = batch * T + t
            left = T - t
            h = tl.load(own + (steps - 1 - i) * SIZE)
            d0, d1, d2, d3 = _rows(dt + row * sdt, sdt, oc, live, left)
            u0, u1, u2, u3 = _rows(u + row * su, su, oc, live, left)
            b0, b1, b2, b3 = _rows(b + row * sb, sb, on, number, left)
            c0, c1, c2, c3 = _rows(c + row * sc, sc, on, number, left)
            y0, y1, y2, y3 = _rows(dy + row * sdy, sdy, oc, live, left)
            s0, s1, s2, s3 = _same(same, row, left, HAS_SEG)
            e0 = tl.math.exp2(d0 * a2) * s0
            e1 = tl.math.exp2(d1 * a2) * s1
            e2 = tl.math.exp2(d2 * a2) * s2
            e3 = tl.math.exp2(d3 * a2) * s3
            p0 = h * e0
            p1 = tl.fma(d0 * u0, b0, p0) * e1
            p2 = tl.fma(d1 * u1, b1, p1) * e2
            p3 = tl.fma(d2 * u2, b2, p2) * e3
            sums = (block * BATCH * T + row) * N
            g, grad_a, gu, gd, gb, gc = _token_back(g, grad_a, e3, p3, u3, d3, b3, c3, y3, a2)
            _store_row(du + (row + 3) * D, oc, gu, write & (left > 3), RC, LN, LC)
            _store_row(ddt + (row + 3) * D, oc, gd, write & (left > 3), RC, LN, LC)
            _store_numbers(db + sums + 3 * N, on, gb, one & (left > 3), RN, LN, LC)
            _store_numbers(dc + sums + 3 * N, on, gc, one & (left > 3), RN, LN, LC)
            g, grad_a, gu, gd, gb, gc = _token_back(g, grad_a, e2, p2, u2, d2, b2, c2, y2, a2)
            _store_row(du + (row + 2) * D, oc, gu, write & (left > 2), RC, LN, LC)
            _store_row(ddt + (row + 2) * D, oc, gd, write & (left > 2), RC, LN, LC)
            _store_numbers(db + sums + 2 * N, on, gb, one & (left > 2), RN, LN, LC)
            _store_numbers(dc + sums + 2 * N, on, gc, one & (left > 2), RN, LN, LC)
            g, grad_a, gu, gd, gb, gc = _token_back(g, grad_a, e1, p1, u1, d1, b1, c1, y1, a2)
            _store_row(du + (row + 1) * D, oc, gu, write & (left > 1), RC, LN, LC)
            _store_row(ddt + (row + 1) * D, oc, gd, write & (left > 1), RC, LN, LC)
            _store_numbers(db + sums + 1 * N, on, gb, one & (left > 1), RN, LN, LC)
            _store_numbers(dc + sums + 1 * N, on, gc, one & (left > 1), RN, LN, LC)
            g, grad_a, gu, gd, gb, gc = _token_back(g, grad_a, e0, p0, u0, d0, b0, c0, y0, a2)
            _store_row(du + (row + 0) * D, oc, gu, write & (left > 0), RC, LN, LC)
            _store_row(ddt + (row + 0) * D, oc, gd, write & (left > 0), RC, LN, LC)
            _store_numbers(db + sums + 0 * N, on, gb, one & (left > 0), RN, LN, LC)
            _store_numbers(dc + sums + 0 * N, on, gc, one & (left > 0), RN, LN, LC)
        tl.debug_barrier()
    tl.store(da + (part * BATCH + batch) * D * N + at, grad_a, mask=tile)
    if part == 0:
        tl.store(dh0 + batch * D * N + at, g, mask=tile)


@triton.jit
def scan_step(
    u, dt, a, b, c, state, slots, y, D, su, sdt, sb, sc, ss,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    """Grid (B, blocks of channels): one token per row. The fp32 state [slots, D, N], whose rows lie `ss` apart, is changed in
    place; `slots [B]` says whose row is whose."""
    batch = tl.program_id(0).to(tl.int64)
    oc = tl.program_id(1) * BD + tl.arange(0, BD)
    on = tl.arange(0, BN)
    live, number = oc < D, on < N
    tile = live[:, None] & number[None, :]
    slot = batch
    if HAS_SLOTS:
        slot = tl.load(slots + batch).to(tl.int64)
    at = oc[:, None] * N + on[None, :]
    step = tl.load(dt + batch * sdt + oc, mask=live, other=0.0).to(tl.float32)
    x = step * tl.load(u + batch * su + oc, mask=live, other=0.0).to(tl.float32)
    a2 = tl.load(a + at, mask=tile, other=0.0).to(tl.float32) * LOG2_E
    bb = tl.load(b + batch * sb + on, mask=number, other=0.0).to(tl.float32)
    cc = tl.load(c + batch * sc + on, mask=number, other=0.0).to(tl.float32)
    h = tl.load(state + slot * ss + at, mask=tile, other=0.0)
    h = h * tl.math.exp2(step[:, None] * a2) + x[:, None] * bb[None, :]
    tl.store(state + slot * ss + at, h, mask=tile)
    tl.store(y + batch * D + oc, tl.sum(h * cc[None, :], 1), mask=live)
