"""Triton kernels of the cross entropy over rows: running maximum and sum, then the gradient in the logits' place.

A program has one row and walks over its columns, with one maximum and one sum per group of neighbours. Logits are read twice
and written once, in 16 bits where they are so.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
GROUP = tl.constexpr(8)  # neighbouring columns of one thread: 16 bytes of a 16-bit row


@triton.jit
def row_stats(logits, labels, peak, total, picked, N, sl, BN: tl.constexpr):
    """Grid (rows). The row's maximum, sum of exp(x - maximum) and the logit of its label (0 for a negative label)."""
    row = tl.program_id(0).to(tl.int64)
    oc = tl.arange(0, BN // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    top = tl.full([BN // GROUP], float("-inf"), tl.float32)
    added = tl.zeros([BN // GROUP], tl.float32)
    for start in range(0, N, BN):
        at = start + oc
        x = tl.load(logits + row * sl + at, mask=at < N, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 1))
        # a group that has seen nothing yet has no maximum: with 0 in its place its sum stays 0
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        added = added * tl.math.exp2((top - shift) * LOG2E) + tl.sum(tl.math.exp2((x - shift[:, None]) * LOG2E), 1)
        top = higher
    best = tl.max(top, 0)
    sum_all = tl.sum(tl.where(top == float("-inf"), 0.0, added * tl.math.exp2((top - best) * LOG2E)), 0)
    label = tl.load(labels + row)
    tl.store(peak + row, best)
    tl.store(total + row, sum_all)
    value = tl.load(logits + row * sl + tl.maximum(label, 0), mask=label >= 0, other=0.0)
    tl.store(picked + row, value.to(tl.float32))


@triton.jit
def row_gradient(logits, labels, peak, total, weights, N, sl, BN: tl.constexpr):
    """Grid (rows, N / BN). logits become weights * (softmax - onehot); rows of weight 0 become 0 whatever they hold."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BN + tl.arange(0, BN)
    label = tl.load(labels + row)
    weight = tl.load(weights + row)
    place = logits + row * sl + at
    x = tl.load(place, mask=at < N, other=0.0).to(tl.float32)
    share = tl.math.exp2((x - tl.load(peak + row)) * LOG2E) * (weight / tl.load(total + row))
    share = tl.where(at == label, share - weight, share)
    tl.store(place, tl.where(weight == 0.0, 0.0, share).to(logits.dtype.element_ty), mask=at < N)
