"""The gated linear scan in chunks: matrix products inside a chunk, a short loop over chunk states, an exact backward.

Same function as `scan_recurrent` in `operator.py`, the reference, at O(s) cost. Tokens are split into chunks of `c`; with L the
running sum of log decays inside a chunk and m its middle,

    inside   A = tril[(q exp(L - L_m)) (k exp(L_m - L))^T],  o = A v
    across   o += (q exp(L)) S,   S' = exp(L_c) S + (k exp(L_c - L))^T v

The middle as reference keeps both factors within exp(+-c/2 * |l|). `chunk_for` halves the chunk until that is at most
exp(+-40), so no product leaves fp32 and every decay is exact: with MetaLA's l >= -softplus(-z)/16 the full 64 are valid for
every gate logit z >= -20, far below what training reaches.

Why a hand-written backward: autograd would keep a dozen [b, s, d] tensors per layer; this saves the inputs and one state
per chunk. The gradient of the log decay uses L's antisymmetry: every pair (i, j) adds q.dq at i and subtracts k.dk at j, so
dl = reverse-cumsum(q.dq - k.dk) inside the chunk plus <dS, S> at its end; no division, no long cancelling sum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops.opaque import opaque, visited
from megatron.ops.precision import outside_autocast

CHUNK = 64
_BOUND = 40.0


class Boundaries(NamedTuple):
    """Document boundaries as 0/1 factors in the layout of the chunks; all ones when there are none."""

    pair: Tensor  # [b, 1, n, c, c]  j <= i and same document
    enter: Tensor | None  # [b, 1, n, c, 1] token belongs to the document of the incoming state
    leave: Tensor | None  # [b, 1, n, c, 1] token belongs to the document of the outgoing state
    carry: Tensor | None  # [b, 1, n, 1, 1] incoming state belongs to the document of the outgoing one


class Scan(NamedTuple):
    """Decay factors of a pass; the backward recomputes them and reads the saved states."""

    decay_in: Tensor  # exp(L)         [b, h, n, c, k]
    decay_out: Tensor  # exp(L_c - L)
    toward: Tensor  # exp(L - L_m)
    against: Tensor  # exp(L_m - L)
    total: Tensor  # exp(L_c)          [b, h, n, k, 1]
    boundaries: Boundaries


def chunk_for(lowest: float, s: int) -> int:
    """Chunk length for `s` tokens whose lowest log decay is `lowest`: at most CHUNK, exponents at most 40 from the middle."""
    c = min(CHUNK, s)
    while c > 1 and (c // 2) * -lowest > _BOUND:
        c //= 2
    return c


def to_chunks(x: Tensor, c: int) -> Tensor:
    """[b, s, h, k] -> [b, h, n, c, k] (a view where s divides by c, else padded with zeros)."""
    b, s, h, k = x.shape
    if s % c:
        x = F.pad(x, (0, 0, 0, 0, 0, c - s % c))
    return x.reshape(b, -1, c, h, k).permute(0, 3, 1, 2, 4)


def from_chunks(x: Tensor, s: int) -> Tensor:
    """[b, h, n, c, k] -> [b, s, h, k]."""
    b, h, n, c, k = x.shape
    return x.permute(0, 2, 3, 1, 4).reshape(b, n * c, h, k)[:, :s]


def boundary_factors(segment_ids: Tensor | None, c: int, like: Tensor, previous: Tensor | None = None) -> Boundaries:
    """Boundary factors for `like [b, h, n, c, k]`; `previous [b, 1]`: document of the incoming state (default: the first)."""
    lower = torch.ones(c, c, dtype=torch.bool, device=like.device).tril()
    if segment_ids is None:
        return Boundaries(lower.to(like.dtype), None, None, None)
    s, n = segment_ids.shape[1], like.shape[2]
    if n * c > s:  # padding continues the last document, so that it does not change the state
        segment_ids = torch.cat([segment_ids, segment_ids[:, -1:].expand(-1, n * c - s)], dim=1)
    ids = segment_ids.reshape(-1, 1, n, c, 1)
    last = ids[:, :, :, -1:]
    first = ids[:, :, :1, :1] if previous is None else previous[:, None, None, :, None]
    before = torch.cat([first, last[:, :, :-1]], dim=2)
    pair = (ids == ids.transpose(-1, -2)) & lower
    return Boundaries(
        pair.to(like.dtype), (ids == before).to(like.dtype), (ids == last).to(like.dtype), (last == before).to(like.dtype)
    )


def prepare(log_decay: Tensor, segment_ids: Tensor | None, c: int, previous: Tensor | None = None) -> Scan:
    """Decay factors of every chunk from `log_decay [b, h, n, c, k]`."""
    ones = torch.ones(c, c, dtype=log_decay.dtype, device=log_decay.device).tril_()
    running = ones @ log_decay
    last, middle = running[..., -1:, :], running[..., c // 2 : c // 2 + 1, :]
    toward = (running - middle).exp_()
    return Scan(
        decay_in=running.exp(),
        decay_out=(last - running).exp_(),
        toward=toward,
        against=toward.reciprocal(),
        total=last.exp().transpose(-1, -2),
        boundaries=boundary_factors(segment_ids, c, log_decay, previous),
    )


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def forward_chunks(
    q: Tensor, k: Tensor, v: Tensor, scan: Scan, scale: float, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Chunked forward on `[b, h, n, c, .]`. Returns o, the state before each chunk `[b, h, n, k, v]`, and the last state."""
    boundaries = scan.boundaries
    added = (_times(k * scan.decay_out, boundaries.leave)).transpose(-1, -2) @ v
    carry = _times(scan.total, boundaries.carry)
    b, h, n, dk, dv = added.shape
    starts = torch.empty_like(added)
    current = added.new_zeros(b, h, dk, dv) if state is None else state
    for i in visited(range(n), starts):
        starts[:, :, i] = current
        current = torch.addcmul(added[:, :, i], carry[:, :, i], current)
    scores = ((q * scan.toward) @ (k * scan.against).transpose(-1, -2)).mul_(boundaries.pair)
    o = (scores @ v).add_(_times(q * scan.decay_in, boundaries.enter) @ starts)
    return o.mul_(scale), starts, current


def backward_chunks(
    q: Tensor, k: Tensor, v: Tensor, scan: Scan, scale: float, starts: Tensor, final: Tensor, do: Tensor, dfinal: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (q, k, v, log_decay, initial state) on `[b, h, n, c, .]` from those of o and of the last state."""
    boundaries = scan.boundaries
    do = do * scale
    reach = _times(q * scan.decay_in, boundaries.enter)
    read = reach.transpose(-1, -2) @ do  # gradient of each chunk's incoming state from its queries
    carry = _times(scan.total, boundaries.carry)
    ends = torch.empty_like(starts)  # gradient of the state after each chunk
    current = torch.zeros_like(final) if dfinal is None else dfinal
    for i in reversed(visited(range(starts.shape[2]), starts)):
        ends[:, :, i] = current
        current = torch.addcmul(read[:, :, i], carry[:, :, i], current)

    toward, against = q * scan.toward, k * scan.against
    scores = (toward @ against.transpose(-1, -2)).mul_(boundaries.pair)
    dscores = (do @ v.transpose(-1, -2)).mul_(boundaries.pair)
    decayed = _times(k * scan.decay_out, boundaries.leave)
    dv = (scores.transpose(-1, -2) @ do).add_(decayed @ ends)
    dq = (dscores @ against).mul_(scan.toward)
    dq.add_(_times((do @ starts.transpose(-1, -2)).mul_(scan.decay_in), boundaries.enter))
    dk = (dscores.transpose(-1, -2) @ toward).mul_(scan.against)
    dk.add_(_times((v @ ends.transpose(-1, -2)).mul_(scan.decay_out), boundaries.leave))

    after = torch.cat([starts[:, :, 1:], final.unsqueeze(2)], dim=2)
    at_end = (ends * after).sum(-1).unsqueeze(-2)
    c = q.shape[3]
    upper = torch.ones(c, c, dtype=q.dtype, device=q.device).triu_()
    dl = (upper @ torch.addcmul(q * dq, k, dk, value=-1)).add_(at_end)
    return dq, dk, dv, dl, current


@outside_autocast
class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def like(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        state: Tensor | None,
        segment_ids: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """See `opaque`."""
        b, _, h, width = q.shape
        return v.new_empty(v.shape), v.new_empty(b, h, width, v.shape[-1])

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        state: Tensor | None,
        segment_ids: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        s = q.shape[1]
        ctx.c, ctx.scale, ctx.has_state = chunk_for(float(log_decay.amin()), s), scale, state is not None
        qc, kc, vc, lc = (to_chunks(x, ctx.c) for x in (q, k, v, log_decay))
        scan = prepare(lc, segment_ids, ctx.c)
        o, starts, final = forward_chunks(qc, kc, vc, scan, scale, state)
        ctx.save_for_backward(q, k, v, log_decay, segment_ids, starts, final)
        return from_chunks(o, s), final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dfinal: Tensor | None) -> Any:
        q, k, v, log_decay, segment_ids, starts, final = ctx.saved_tensors
        s = q.shape[1]
        qc, kc, vc, lc, doc = (to_chunks(x, ctx.c) for x in (q, k, v, log_decay, do))
        scan = prepare(lc, segment_ids, ctx.c)
        *grads, dstate = backward_chunks(qc, kc, vc, scan, ctx.scale, starts, final, doc, dfinal)
        return *(from_chunks(g, s) for g in grads), dstate if ctx.has_state else None, None, None


_chunked_scan = opaque("chunked_scan", _ChunkedScan)


def scan_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    state: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`scan_recurrent` in O(s) with matrix products; any length, gradients to every input and to the initial state.

    Returns `o [b, s, h, v]` and the state after the last token `[b, h, k, v]`.
    """
    if not q.numel():  # no rows or no tokens
        b, _, h, width = q.shape
        return v * scale, v.new_zeros(b, h, width, v.shape[-1]) if state is None else state
    return _chunked_scan(q, k, v, log_decay, state, segment_ids, scale)
