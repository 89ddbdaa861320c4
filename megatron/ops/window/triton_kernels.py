"""Triton kernels of a step of windowed attention over a ring: attention and the new entry of one head, then the counters.

All programs of a row find the same oldest entry; its place is written by a second kernel, when none of them reads it any more.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(0x7FFFFFFFFFFF)  # later than any token


@triton.jit
def _older(places, row, start, W, BW: tl.constexpr, oldest, slot):
    """(places of a block of entries, the smallest place so far, where it is); the first one of equals."""
    at = start + tl.arange(0, BW)
    place = tl.load(places + row * W + at, mask=at < W, other=NEVER).to(tl.int64)
    lowest = tl.min(place, 0)
    first = start + tl.argmin(place, 0)
    return place, tl.minimum(oldest, lowest), tl.where(lowest < oldest, first, slot)


@triton.jit
def window_step(
    q, k, v, keys, values, places, seen, y, G, W, D, scale, sq, sk, sv,
    SHARE: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid (b * g). q [b, g * SHARE, D], k and v [b, g, D] with rows sq, sk, sv apart; the ring [b, W, g, D] and y dense."""
    row = (tl.program_id(0) // G).to(tl.int64)
    g = tl.program_id(0) % G
    od = tl.arange(0, BD)
    kk = tl.load(k + row * sk + g * D + od, mask=od < D, other=0.0)
    vv = tl.load(v + row * sv + g * D + od, mask=od < D, other=0.0)
    own_key = kk.to(keys.dtype.element_ty)
    own_value = vv.to(values.dtype.element_ty)
    now = tl.load(seen + row).to(tl.int64)
    slot = 0
    for i in tl.static_range(SHARE):
        h = g * SHARE + i
        qq = tl.load(q + row * sq + h * D + od, mask=od < D, other=0.0).to(tl.float32) * (scale * LOG2E)
        top = tl.sum(qq * own_key.to(tl.float32), 0)
        total = top * 0.0 + 1.0
        gathered = own_value.to(tl.float32)
        oldest = now * 0 + NEVER
        slot = 0
        for start in range(0, W, BW):
            place, oldest, slot = _older(places, row, start, W, BW, oldest, slot)
            live = (place >= 0) & (place <= now) & (now - place <= W)
            entry = ((row * W + start + tl.arange(0, BW)) * G + g)[:, None] * D + od[None, :]
            inside = live[:, None] & (od < D)[None, :]
            scores = tl.sum(tl.load(keys + entry, mask=inside, other=0.0).to(tl.float32) * qq[None, :], 1)
            scores = tl.where(live, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 0))
            fade = tl.math.exp2(top - higher)
            weight = tl.math.exp2(scores - higher)
            rows = tl.load(values + entry, mask=inside, other=0.0).to(tl.float32)
            gathered = gathered * fade + tl.sum(weight[:, None] * rows, 0)
            total = total * fade + tl.sum(weight, 0)
            top = higher
        out = y + (row * G * SHARE + h) * D + od
        tl.store(out, (gathered / total).to(y.dtype.element_ty), mask=od < D)
    tl.debug_barrier()  # every thread has read the ring
    entry = ((row * W + slot) * G + g) * D + od
    tl.store(keys + entry, own_key, mask=od < D)
    tl.store(values + entry, own_value, mask=od < D)


@triton.jit
def window_count(places, seen, W, BW: tl.constexpr):
    """Grid (b). The oldest entry's place becomes `seen`, which grows by one."""
    row = tl.program_id(0).to(tl.int64)
    now = tl.load(seen + row)
    oldest = now.to(tl.int64) * 0 + NEVER
    slot = 0
    for start in range(0, W, BW):
        _, oldest, slot = _older(places, row, start, W, BW, oldest, slot)
    tl.debug_barrier()
    tl.store(places + row * W + slot, now)
    tl.store(seen + row, now + 1)
