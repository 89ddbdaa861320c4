"""Causal linear attention with the Taylor feature map (Based): quadratic and in chunks with an exact backward.

    p(q, k) = 1 + s + s^2 / 2,  s = q.k / sqrt(f)
    y_i = sum_{j<=i} g^(i-j) p(q_i, k_j) v_j / ( sum_{j<=i} p(q_i, k_j) + 1e-12 )

(Based, arXiv 2402.18668, section 3; the optional fixed decay g per head touches the numerator only, as in the released
`based-360M-30B`.) The denominator is one more value column: u_j = [v_j | 1] and S_t = S_{t-1} + phi(k_t)^T u_t of [e, v + 1].
It is at least (i+1)/2, so the 1e-12 only keeps rows without any token (left padding) at 0 instead of 0/0.

In chunks of c tokens: inside a chunk p is formed from q.k of width f, across chunks through phi of width e; memory is O(s).
What is kept for the backward: q, k, v, y, the denominators, and one state per chunk. All of it is fp32 inside (fp64 for fp64).
`TaylorInputs` has the shapes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops.dispatch import choose, path
from megatron.ops.opaque import opaque, unvisited_like, visited
from megatron.ops.precision import in_accumulation_dtype, outside_autocast, sum_dtype
from megatron.ops.taylor.features import (
    feature_count,
    features_by_definition,
    taylor_features,
    taylor_features_backward,
)
from megatron.ops.taylor.inputs import TaylorInputs

TAYLOR_CHUNK = 128
TAYLOR_EPS = 1e-12
_ROWS = 512  # tokens of several batch rows that are worked on together on a CPU, so that a chunk's matrices stay in its cache


def normalised(sums: Tensor) -> Tensor:
    """`[..., v + 1]` of numerators and denominator -> `[..., v]`."""
    return sums[..., :-1] / (sums[..., -1:] + TAYLOR_EPS)


def empty_taylor_state(b: int, h: int, f: int, v: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros `[b, h, e, v + 1]`; `dtype` is the model's."""
    return torch.zeros(b, h, feature_count(f), v + 1, dtype=sum_dtype(dtype), device=device)


def values_and_one(v: Tensor, keep: Tensor | None) -> Tensor:
    """u = [v | 1], zero where nothing is kept: `[..., v]` -> `[..., v + 1]`; keep broadcasts over what lies before v."""
    u = torch.cat([in_accumulation_dtype(v), v.new_ones(*v.shape[:-1], 1, dtype=sum_dtype(v.dtype))], -1)
    return u if keep is None else u * keep.to(u.dtype)


@path("taylor", "reference")
@outside_autocast
def taylor_quadratic(x: TaylorInputs) -> tuple[Tensor, Tensor]:
    """All pairs at once, by autograd; O(s^2) memory: for tests and for reading."""
    q, k, v, keep, log_decay, segment_ids, state, divide = x
    s, f = q.shape[1], q.shape[-1]
    u = values_and_one(v, None if keep is None else keep[..., None, None])
    qs, ks = in_accumulation_dtype(q) * f**-0.25, in_accumulation_dtype(k) * f**-0.25
    seen = torch.ones(s, s, dtype=torch.bool, device=q.device).tril()[None]
    first = torch.ones(1, s, dtype=torch.bool, device=q.device)
    if segment_ids is not None:
        seen = seen & (segment_ids[:, :, None] == segment_ids[:, None])
        first = segment_ids == segment_ids[:, :1]
    scores = torch.einsum("bihf,bjhf->bhij", qs, ks)
    pairs = (1 + scores + scores * scores / 2) * seen[:, None]
    running = qs.new_zeros(1, s, q.shape[2]) if log_decay is None else log_decay.to(qs.dtype).cumsum(1)
    fall = (running[:, :, None] - running[:, None]).masked_fill(~seen[..., None], float("-inf")).exp().permute(0, 3, 1, 2)
    sums = torch.cat(
        [torch.einsum("bhij,bjhv->bihv", pairs * fall, u[..., :-1]), torch.einsum("bhij,bjhv->bihv", pairs, u[..., -1:])], -1
    )
    phi_k = features_by_definition(ks)
    weight = torch.cat([fall[:, :, -1:].expand(-1, -1, v.shape[-1], -1), seen[:, None, -1:].expand(-1, q.shape[2], 1, -1)], 2)
    final = torch.einsum("bjhe,bjhv,bhvj->bhev", phi_k, u, weight.to(u.dtype))
    if state is not None:
        reach = torch.cat([running[..., None].exp().expand(-1, -1, -1, v.shape[-1]), torch.ones_like(running[..., None])], -1)
        reach = reach * first[..., None, None]
        sums = sums + torch.einsum("bihe,bhev->bihv", features_by_definition(qs), state) * reach
        final = final + state * reach[:, -1].unsqueeze(-2)
    return (normalised(sums).to(v.dtype) if divide else sums), final


class _Piece(NamedTuple):
    """One chunk of a few batch rows, heads before tokens, with the factors of documents and decay (None: all ones)."""

    q: Tensor  # [b, h, c, f], divided by f^(1/4), as k
    k: Tensor
    u: Tensor  # [b, h, c, v + 1]
    pair: Tensor  # [b or 1, 1, c, c]  j <= i and same document
    fall: Tensor | None  # [b or 1, h, c, c]  decay from j to i, numerators only
    enter: Tensor | None  # [b, h or 1, c, v + 1 or 1]  what a token sees of the incoming state
    leave: Tensor | None  # what of a token reaches the outgoing state
    carry: Tensor | None  # [b, h or 1, 1, v + 1 or 1]  what of the incoming state reaches the outgoing one


def _row_groups(x: TaylorInputs) -> list[slice]:
    """Batch rows that are worked on together."""
    b, s = x.q.shape[:2]
    rows = b if x.q.device.type != "cpu" else max(1, _ROWS // max(1, min(s, TAYLOR_CHUNK)))
    return [slice(r, min(r + rows, b)) for r in range(0, b, rows)]


def _piece(x: TaylorInputs, rows: slice, start: int) -> _Piece:
    """The chunk of `rows` that begins at token `start`."""
    at = (rows, slice(start, start + TAYLOR_CHUNK))
    scale = x.q.shape[-1] ** -0.25
    q, k = (in_accumulation_dtype(part[at]).transpose(1, 2) * scale for part in (x.q, x.k))
    keep = None if x.keep is None else x.keep[at][:, None, :, None]
    u = values_and_one(x.v[at].transpose(1, 2), keep)
    pair = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril_()[None, None]
    enter = leave = carry = None
    if x.segment_ids is not None:
        ids = x.segment_ids[at][:, None, :, None]
        before = ids[:, :, :1] if start == 0 else x.segment_ids[rows, start - 1][:, None, None, None]
        last = ids[:, :, -1:]
        pair = pair & (ids == ids.transpose(-1, -2))
        enter, leave, carry = ((a == b).to(q.dtype) for a, b in ((ids, before), (ids, last), (last, before)))
    if x.log_decay is None:
        return _Piece(q, k, u, pair.to(q.dtype), None, enter, leave, carry)
    l_rows = rows if x.log_decay.shape[0] > 1 else slice(None)
    running = x.log_decay[l_rows, at[1]].to(q.dtype).cumsum(1).transpose(1, 2).unsqueeze(-1)  # [b or 1, h, c, 1]
    last = running[:, :, -1:]
    fall = (running - running.transpose(-1, -2)).tril_().exp_()
    width = x.v.shape[-1]
    factors = (_columns(decay.exp(), width, cut) for decay, cut in ((running, enter), (last - running, leave), (last, carry)))
    return _Piece(q, k, u, pair.to(q.dtype), fall, *factors)


def _columns(decay: Tensor, width: int, boundary: Tensor | None) -> Tensor:
    """A factor `[.., 1]` of the numerators' `width` columns beside ones for the denominator, times a document factor."""
    both = torch.cat([decay.expand(*decay.shape[:-1], width), torch.ones_like(decay)], -1)
    return both if boundary is None else both * boundary


def _scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _polynomial(piece: _Piece) -> tuple[Tensor, Tensor]:
    """(1 + s, p masked by `pair`) of all pairs inside a chunk."""
    slope = piece.q @ piece.k.transpose(-1, -2)
    slope += 1.0
    p = torch.addcmul(
        torch.ones((), dtype=slope.dtype, device=slope.device), slope, slope
    )  # 1 + s + s^2/2 = (1 + (1 + s)^2) / 2
    return slope, p.mul_(piece.pair).mul_(0.5)


def _inside(p: Tensor, fall: Tensor | None, u: Tensor) -> Tensor:
    """Weights `[.., i, j]` times values; the decay acts on all columns but the last."""
    if fall is None:
        return p @ u
    return torch.cat([(p * fall) @ u[..., :-1], p @ u[..., -1:]], -1)


def _piece_forward(piece: _Piece, state: Tensor) -> tuple[Tensor, Tensor]:
    """Sums `[b, h, c, v + 1]` of one chunk and the state after it."""
    _, p = _polynomial(piece)
    sums = _inside(p, piece.fall, piece.u)
    sums += _scaled(taylor_features(piece.q) @ state, piece.enter)
    added = taylor_features(piece.k).transpose(-1, -2) @ _scaled(piece.u, piece.leave)
    return sums, added.add_(_scaled(state, piece.carry))


def _piece_backward(piece: _Piece, state: Tensor, dsums: Tensor, dend: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k (unscaled), u and of the incoming state, from those of the sums and of the outgoing state."""
    slope, p = _polynomial(piece)
    if piece.fall is None:
        dp = dsums @ piece.u.transpose(-1, -2)
    else:
        dp = (dsums[..., :-1] @ piece.u[..., :-1].transpose(-1, -2)).mul_(piece.fall)
        dp += dsums[..., -1:] * piece.u[..., -1:].transpose(-1, -2)
    fall = None if piece.fall is None else piece.fall.transpose(-1, -2)
    du = _inside(p.transpose(-1, -2), fall, dsums)
    dscores = dp.mul_(slope).mul_(piece.pair)
    phi_q, phi_k = taylor_features(piece.q), taylor_features(piece.k)
    read, kept = _scaled(dsums, piece.enter), _scaled(piece.u, piece.leave)
    dq = dscores @ piece.k
    dq += taylor_features_backward(piece.q, read @ state.transpose(-1, -2))
    dk = dscores.transpose(-1, -2) @ piece.q
    dk += taylor_features_backward(piece.k, kept @ dend.transpose(-1, -2))
    du += _scaled(phi_k @ dend, piece.leave)
    dstart = (phi_q.transpose(-1, -2) @ read).add_(_scaled(dend, piece.carry))
    scale = piece.q.shape[-1] ** -0.25
    return dq.mul_(scale), dk.mul_(scale), du, dstart


@outside_autocast
class _TaylorScan(torch.autograd.Function):
    @staticmethod
    def like(*inputs: Any) -> tuple[Tensor, Tensor]:
        """See `opaque`."""
        return TaylorInputs(*inputs).empty_results()

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keep: Tensor | None,
        log_decay: Tensor | None,
        segment_ids: Tensor | None,
        state: Tensor | None,
        divide: bool,
    ) -> tuple[Tensor, Tensor]:
        x = TaylorInputs(q, k, v, keep, log_decay, segment_ids, state, divide)
        y, final = x.empty_results()
        s, wide, saves = q.shape[1], sum_dtype(v.dtype), any(ctx.needs_input_grad)
        below = v.new_empty(*q.shape[:3], 1, dtype=wide) if divide else None
        begun, starts, unvisited = dict[tuple[int, int], Tensor](), range(0, s, TAYLOR_CHUNK), list[Tensor]()
        for rows in _row_groups(x):
            current = torch.zeros_like(final[rows]) if state is None else state[rows].to(wide)
            for place, start in enumerate(visited(starts, q)):
                if saves:
                    begun[rows.start, start] = current
                sums, current = _piece_forward(_piece(x, rows, start), current)
                sums = sums.transpose(1, 2)
                at = (rows, slice(start, start + TAYLOR_CHUNK))
                y[at] = normalised(sums) if divide else sums
                if below is not None:
                    below[at] = sums[..., -1:] + TAYLOR_EPS
                unvisited += unvisited_like(starts, [current]) if saves and place == 1 else []
            final[rows] = current
        ctx.save_for_backward(q, k, v, keep, log_decay, segment_ids, below, y if divide else None)
        ctx.begun, ctx.unvisited, ctx.has_state, ctx.divide = begun, unvisited, state is not None, divide
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor | None) -> Any:
        q, k, v, keep, log_decay, segment_ids, below, y = ctx.saved_tensors
        x = TaylorInputs(q, k, v, keep, log_decay, segment_ids, divide=ctx.divide)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        starts, dstates = range(0, q.shape[1], TAYLOR_CHUNK), []
        for rows in _row_groups(x):
            current = None if dfinal is None else dfinal[rows]
            for start in reversed(visited(starts, q)):
                at = (rows, slice(start, start + TAYLOR_CHUNK))
                dsums = in_accumulation_dtype(dy[at])
                if ctx.divide:
                    dsums = dsums / below[at]
                    dsums = torch.cat([dsums, -(dsums * y[at]).sum(-1, keepdim=True)], -1)
                begun = ctx.begun[rows.start, start]
                end = torch.zeros_like(begun) if current is None else current
                piece = _piece(x, rows, start)
                *grads, current = _piece_backward(piece, begun, dsums.transpose(1, 2), end)
                dq[at], dk[at] = (g.transpose(1, 2) for g in grads[:2])
                du = grads[2][..., :-1].transpose(1, 2)
                dv[at] = du if keep is None else du * keep[at][..., None, None].to(du.dtype)
            dstates.append(current)
        dstate = torch.cat([d for d in dstates if d is not None]) if ctx.has_state and len(starts) else dfinal
        return dq, dk, dv, None, None, None, dstate if ctx.has_state else None, None


_taylor_scan = opaque("taylor_scan", _TaylorScan)


@path("taylor", "torch")
def taylor_chunked(x: TaylorInputs) -> tuple[Tensor, Tensor]:
    """The chunked form at the head of this file, O(s) in time and memory."""
    return _taylor_scan(*x)


def taylor(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    state: Tensor | None = None,
    keep: Tensor | None = None,
    log_decay: Tensor | None = None,
    segment_ids: Tensor | None = None,
    divide: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`y [b, s, h, v]` in v's dtype (divide=False: the sums `[b, s, h, v + 1]`, fp32) and the state after the last token."""
    return choose("taylor", backend, q.device)(TaylorInputs(q, k, v, keep, log_decay, segment_ids, state, divide))
