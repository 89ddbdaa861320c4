"""Triton kernels of act(a) * b: one pass forward (two reads, one write), one backward (three reads, two writes).

Everything is formed in fp32 and rounded once. A program has a tile of rows and columns, so that a and b may be columns of a
packed projection; the backward forms the activation again.
"""

import triton
import triton.language as tl

SILU = tl.constexpr(0)
GELU = tl.constexpr(1)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.math.exp2(-x * LOG2E))


@triton.jit
def _activation(a, ACT: tl.constexpr):
    """(act(a), its derivative). SiLU and the tanh form of GELU are a * sigmoid(z), with z = a and 2 sqrt(2/pi) (a + c a^3)."""
    if ACT == GELU:
        share = 0.5 * (1.0 + tl.math.erf(a * 0.7071067811865476))
        slope = a * 0.3989422804014327 * tl.math.exp2(a * a * (-0.5 * LOG2E))
    elif ACT == SILU:
        share = _sigmoid(a)
        slope = a * share * (1.0 - share)
    else:
        square = a * a
        share = _sigmoid(1.5957691216057308 * a * (1.0 + 0.044715 * square))
        slope = a * share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * square)
    return a * share, share + slope


@triton.jit
def _tile(N, D, ROWS: tl.constexpr, BN: tl.constexpr):
    """Rows [ROWS, 1] and columns [1, BN] of this program, and which of them exist; neighbours share rows."""
    columns = tl.cdiv(D, BN)
    at = tl.program_id(0)
    row = ((at // columns) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = ((at % columns) * BN + tl.arange(0, BN))[None, :]
    return row, column, (row < N) & (column < D)


@triton.jit
def gated_forward(a, b, y, N, D, sa, sb, ACT: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr):
    """Grid (N / ROWS * D / BN). a and b [N, D] with rows sa and sb apart; y dense."""
    row, column, inside = _tile(N, D, ROWS, BN)
    aa = tl.load(a + row * sa + column, mask=inside, other=0.0).to(tl.float32)
    bb = tl.load(b + row * sb + column, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activation(aa, ACT)
    tl.store(y + row * D + column, (value * bb).to(y.dtype.element_ty), mask=inside)


@triton.jit
def gated_backward(
    dy, a, b, dfirst, dsecond, N, D, sdy, sa, sb, sda, sdb,
    ACT: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid as forward. dfirst = dy b act'(a), dsecond = dy act(a), with rows sda and sdb apart."""
    row, column, inside = _tile(N, D, ROWS, BN)
    up = tl.load(dy + row * sdy + column, mask=inside, other=0.0).to(tl.float32)
    aa = tl.load(a + row * sa + column, mask=inside, other=0.0).to(tl.float32)
    bb = tl.load(b + row * sb + column, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activation(aa, ACT)
    tl.store(dfirst + row * sda + column, (up * bb * slope).to(dfirst.dtype.element_ty), mask=inside)
    tl.store(dsecond + row * sdb + column, (up * value).to(dsecond.dtype.element_ty), mask=inside)
