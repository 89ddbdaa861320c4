"""The MetaLA operator in chunks: matrix products in blocks that fit a CPU's cache, one hand-written backward.

The formulas are those of `ops/metala/reference.py`; the scan is that of `ops/scan/chunk.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops.metala.reference import EPS, TAU
from megatron.ops.opaque import opaque, unvisited_like, visited
from megatron.ops.precision import in_accumulation_dtype, outside_autocast, sum_dtype
from megatron.ops.scan.chunk import backward_chunks, chunk_for, forward_chunks, from_chunks, prepare, to_chunks

_CPU_TOKENS = 1024  # a dozen fp32 intermediates of this many tokens at width 256 fit the last-level cache


class _Block(NamedTuple):
    """A run of tokens of a few batch rows, small enough that its intermediates stay in the CPU's cache."""

    rows: slice
    tokens: slice

    def of(self, x: Tensor) -> Tensor:
        return x[self.rows, self.tokens]

    def previous(self, segment_ids: Tensor | None) -> Tensor | None:
        """[b, 1] document of the token before this block, None at the start."""
        at = self.tokens.start
        return None if segment_ids is None or at == 0 else segment_ids[self.rows, at - 1 : at]


class _Saved(NamedTuple):
    """What one block keeps for its backward, in the layout of chunks."""

    q: Tensor
    log_decay: Tensor
    v: Tensor
    g: Tensor
    amount: Tensor
    normed: Tensor
    rstd: Tensor
    starts: Tensor
    final: Tensor


def _blocks(b: int, s: int, device: torch.device) -> list[list[_Block]]:
    """Row groups, each a list of token runs in order. A GPU takes everything at once; a CPU about 1,024 tokens at a time."""
    if device.type != "cpu":
        return [[_Block(slice(0, b), slice(0, s))]]
    rows = max(1, _CPU_TOKENS // s)
    runs = [slice(t, min(t + _CPU_TOKENS, s)) for t in range(0, s, _CPU_TOKENS)]
    return [[_Block(slice(r, min(r + rows, b)), run) for run in runs] for r in range(0, b, rows)]


def _block_forward(
    q: Tensor,
    z: Tensor,
    v: Tensor,
    g: Tensor,
    w: Tensor,
    state: Tensor | None,
    ids: Tensor | None,
    previous: Tensor | None,
    c: int,
) -> tuple[Tensor, _Saved]:
    s, dk = q.shape[1], q.shape[-1]
    qc, vc, gc = (to_chunks(in_accumulation_dtype(x), c).contiguous() for x in (q, v, g))
    # padding of the last chunk has log decay 0: decay 1, key 0, so it leaves the state alone
    log_decay = to_chunks(F.logsigmoid(in_accumulation_dtype(z)).div_(TAU), c).contiguous()
    key = torch.expm1(log_decay).neg_()
    o, starts, final = forward_chunks(qc, key, vc, prepare(log_decay, ids, c, previous), dk**-0.5, state)
    amount = (qc * key).mul_(in_accumulation_dtype(w)[:, None, None, :]).sum(-1, keepdim=True)
    r = torch.sigmoid_(amount * vc).add_(o)
    normed, _, rstd = torch.native_layer_norm(r, r.shape[-1:], None, None, EPS)
    y = from_chunks(F.silu(gc).mul_(normed), s)
    return y, _Saved(qc, log_decay, vc, gc, amount, normed, rstd, starts, final)


def _block_backward(
    saved: _Saved, w: Tensor, dy: Tensor, dfinal: Tensor | None, ids: Tensor | None, previous: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, of the log decay, of v and g as [b, s, h, .], of w, and of the incoming state."""
    q, log_decay, v, g, amount, normed, rstd, starts, final = saved
    s, c = dy.shape[1], q.shape[3]
    key = torch.expm1(log_decay).neg_()
    dyc = to_chunks(in_accumulation_dtype(dy), c)
    dg = torch.ops.aten.silu_backward(dyc * normed, g)
    # an already normed row has mean 0 and rstd 1, so its norm's backward needs no more than a final factor of the true rstd
    plain = torch.zeros_like(rstd), torch.ones_like(rstd), None, None, [True, False, False]
    dnormed = F.silu(g).mul_(dyc)
    dr = torch.ops.aten.native_layer_norm_backward(dnormed, normed, normed.shape[-1:], *plain)[0].mul_(rstd)
    dinner = torch.ops.aten.sigmoid_backward(dr, torch.sigmoid_(amount * v))
    damount = (dinner * v).sum(-1, keepdim=True)
    scale = q.shape[-1] ** -0.5
    dq, dkey, dv, dl, dstate = backward_chunks(
        q, key, v, prepare(log_decay, ids, c, previous), scale, starts, final, dr, dfinal
    )
    dv.addcmul_(amount, dinner)
    weighted = damount * in_accumulation_dtype(w)[:, None, None, :]
    dw = (damount * q).mul_(key).sum((0, 2, 3))
    dq.addcmul_(weighted, key)
    dkey.addcmul_(weighted, q)
    dl.addcmul_(dkey, key - 1)  # d(1 - exp(l)) / dl = -exp(l) = key - 1
    return from_chunks(dq, s), from_chunks(dl, s), from_chunks(dv, s), from_chunks(dg, s), dw, dstate


@outside_autocast
class _MetaLA(torch.autograd.Function):
    """The chunked form, block by block, with one hand-written backward over all stages; fp32 (or fp64) inside."""

    @staticmethod
    def like(
        q: Tensor, z: Tensor, v: Tensor, g: Tensor, w: Tensor, state: Tensor | None, segment_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `opaque`."""
        b, _, h, k = q.shape
        return v.new_empty(v.shape), v.new_empty(b, h, k, v.shape[-1], dtype=sum_dtype(q.dtype))

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, z: Tensor, v: Tensor, g: Tensor, w: Tensor, state: Tensor | None, segment_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        b, s = q.shape[:2]
        c = chunk_for(float(F.logsigmoid(in_accumulation_dtype(z.amin()))) / TAU, s)
        y, kept, tensors = torch.empty_like(v), [], list[Tensor]()
        finals, unvisited = list[Tensor](), list[Tensor]()
        for runs in _blocks(b, s, q.device):
            current = None if state is None else state[runs[0].rows]
            for place, block in enumerate(visited(runs, q)):
                ids = None if segment_ids is None else block.of(segment_ids)
                q_part, z_part, v_part, g_part = (block.of(x) for x in (q, z, v, g))
                out, saved = _block_forward(q_part, z_part, v_part, g_part, w, current, ids, block.previous(segment_ids), c)
                y[block.rows, block.tokens] = out
                current = saved.final
                if any(ctx.needs_input_grad):
                    kept.append(block)
                    tensors += saved
                    unvisited += unvisited_like(runs, saved) if place == 1 else []
            assert current is not None  # every row group has at least one run
            finals.append(current)
        # Saved through autograd, which frees them after the backward and saves none under recomputation.
        ctx.save_for_backward(z, w, segment_ids, *tensors, *unvisited)
        ctx.kept, ctx.has_state, ctx.like = kept, state is not None, (q.dtype, v.dtype, g.dtype, q.shape, v.shape)
        return y, torch.cat(finals) if len(finals) > 1 else finals[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor | None) -> Any:
        z, w, segment_ids, *tensors = ctx.saved_tensors
        size = len(_Saved._fields)
        q_type, v_type, g_type, q_shape, v_shape = ctx.like
        dq, dz = (torch.empty(q_shape, dtype=t, device=z.device) for t in (q_type, z.dtype))
        dv, dg = (torch.empty(v_shape, dtype=t, device=z.device) for t in (v_type, g_type))
        dw, dstates = torch.zeros_like(w, dtype=in_accumulation_dtype(w).dtype), []
        current: Tensor | None = None
        for place, block in reversed(list(enumerate(ctx.kept))):
            saved = _Saved(*tensors[place * size : (place + 1) * size])
            if block.tokens.stop == z.shape[1]:
                current = None if dfinal is None else dfinal[block.rows]
            ids = None if segment_ids is None else block.of(segment_ids)
            at = (block.rows, block.tokens)
            dq[at], dl, dv[at], dg[at], dw_part, current = _block_backward(
                saved, w, block.of(dy), current, ids, block.previous(segment_ids)
            )
            dz[at] = dl * torch.sigmoid(-in_accumulation_dtype(block.of(z))).div_(TAU)
            dw += dw_part
            if block.tokens.start == 0:
                dstates.append(current)
        dstate = torch.cat(dstates[::-1]) if ctx.has_state else None
        return dq, dz, dv, dg, dw.to(w.dtype), dstate, None


metala_chunked = opaque("metala", _MetaLA)
"""(q, z, v, g, w, state, segment_ids) -> y and the last state; for the compiler a single operator."""
