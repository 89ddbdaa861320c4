"""The MetaLA operator: gate, key, decay, scan, self-augmentation, per-head norm and output gate as one function.

From query q, gate logits z, values v and output-gate logits g of all heads (MetaLA, arXiv 2411.10741, as its released code
computes it; w is the self-augmentation vector):

    l = logsigmoid(z) / 16        key = 1 - exp(l)        S_t = diag(exp(l_t)) S_{t-1} + key_t^T v_t
    r_t = dk^-1/2 q_t S_t  +  sigmoid( (sum_i q_i key_i w_i) v_t )          q is NOT scaled in the second term
    y_t = SiLU(g_t) * LayerNorm_head(r_t)                                   no weight, no bias, eps 1e-5

Gate and key are formed in fp32 and the key as -expm1(l): in half precision 1 - exp(l) cancels to zero for most slow
channels. `gate_round` reproduces the rounding of the originals, to score released checkpoints as they were published.

Shapes: q, z [b, s, h, k]; v, g, y [b, s, h, v]; w [h, k]; state [b, h, k, v] in fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops.chunk import CHUNK, backward_chunks, forward_chunks, from_chunks, prepare, scan_chunked, to_chunks
from megatron.ops.dispatch import choose, path
from megatron.ops.scan import scan_recurrent

TAU = 16.0
EPS = 1e-5
_ROUND = {"bf16": torch.bfloat16, "fp16": torch.float16}


def wide(x: Tensor) -> Tensor:
    """fp32, or fp64 when x is fp64: the precision of gates, states and norms."""
    return x if x.dtype == torch.float64 else x.float()


def decay_and_key(z: Tensor, gate_round: str = "none") -> tuple[Tensor, Tensor]:
    """Log decay l and key 1 - exp(l) from gate logits, in fp32 (or fp64)."""
    if gate_round == "none":
        log_decay = F.logsigmoid(wide(z)) / TAU
        return log_decay, -torch.expm1(log_decay)
    half = _ROUND[gate_round]
    log_decay = F.logsigmoid(z.to(half)) / TAU
    return wide(log_decay), wide(1 - torch.exp(log_decay))


def _finish(o: Tensor, q: Tensor, key: Tensor, v: Tensor, g: Tensor, w: Tensor) -> Tensor:
    """Self-augmentation, per-head norm and output gate on top of the scan's output."""
    amount = (q * key * w).sum(-1, keepdim=True)
    r = o + torch.sigmoid(amount * v)
    normed = F.layer_norm(r, r.shape[-1:], eps=EPS)
    return normed * F.silu(wide(g))


@path("metala", "reference")
def metala_reference(
    q: Tensor, z: Tensor, v: Tensor, g: Tensor, w: Tensor, state: Tensor | None, mask: Tensor | None, segment_ids: Tensor | None, gate_round: str
) -> tuple[Tensor, Tensor]:
    """The formulas above, token by token."""
    log_decay, key = decay_and_key(z, gate_round)
    if mask is not None:
        keep = mask[..., None, None].to(key.dtype)
        log_decay, key = log_decay * keep, key * keep
    qw, vw, ww = wide(q), wide(v), wide(w)
    o, final = scan_recurrent(qw, key, vw, log_decay, scale=q.shape[-1] ** -0.5, state=state, segment_ids=segment_ids)
    return _finish(o, qw, key, vw, g, ww).to(v.dtype), final


class _MetaLA(torch.autograd.Function):
    """The chunked form with one hand-written backward over all stages. Everything inside is fp32 (or fp64)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, z: Tensor, v: Tensor, g: Tensor, w: Tensor, state: Tensor | None, segment_ids: Tensor | None) -> Any:
        b, s, h, dk = q.shape
        c = min(CHUNK, s)
        qc, vc, gc = (to_chunks(wide(x), c).contiguous() for x in (q, v, g))
        log_decay = F.logsigmoid(wide(z)).div_(TAU)
        log_decay = to_chunks(log_decay, c).contiguous()  # zero padding: decay 1, key 0
        key = torch.expm1(log_decay).neg_()
        scan = prepare(log_decay, segment_ids, c)
        o, starts, final = forward_chunks(qc, key, vc, scan, dk**-0.5, state)
        amount = torch.einsum("bhnck,bhnck,hk->bhnc", qc, key, wide(w)).unsqueeze(-1)
        r = torch.sigmoid(amount * vc).add_(o)
        normed, _, rstd = torch.native_layer_norm(r, r.shape[-1:], None, None, EPS)
        ctx.save_for_backward(qc, log_decay, vc, gc, w, amount, normed, rstd, starts, final, segment_ids)
        ctx.dtypes, ctx.z, ctx.shape, ctx.has_state = (q.dtype, z.dtype, v.dtype, g.dtype), z, (s, c, dk), state is not None
        return from_chunks(F.silu(gc).mul_(normed), s).to(v.dtype), final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor | None) -> Any:
        q, log_decay, v, g, w, amount, normed, rstd, starts, final, segment_ids = ctx.saved_tensors
        s, c, dk = ctx.shape
        dyc = to_chunks(wide(dy), c)
        key = torch.expm1(log_decay).neg_()
        dnormed = F.silu(g).mul_(dyc)
        dg = torch.ops.aten.silu_backward((dyc * normed), g)
        dr = torch.addcmul(dnormed - dnormed.mean(-1, keepdim=True), normed, (dnormed * normed).mean(-1, keepdim=True), value=-1)
        dr.mul_(rstd)
        gate = torch.sigmoid(amount * v)
        dinner = torch.ops.aten.sigmoid_backward(dr, gate)
        damount = (dinner * v).sum(-1, keepdim=True)
        ww = wide(w)[None, :, None, None, :]
        scan = prepare(log_decay, segment_ids, c)
        dq, dkey, dv, dl, dstate = backward_chunks(q, key, v, scan, dk**-0.5, starts, final, dr, dfinal)
        dv.addcmul_(amount, dinner)
        dw = torch.einsum("bhnc,bhnck,bhnck->hk", damount.squeeze(-1), q, key)
        weighted = damount * ww
        dq.addcmul_(weighted, key)
        dkey.addcmul_(weighted, q)
        dl.addcmul_(dkey, key - 1)  # d(1 - exp(l)) / dl = -exp(l) = key - 1
        dz = from_chunks(dl, s) * torch.sigmoid(-wide(ctx.z)).div_(TAU)
        grads = [from_chunks(x, s).to(t) for x, t in zip((dq, dv, dg), (ctx.dtypes[0], *ctx.dtypes[2:]), strict=True)]
        return grads[0], dz.to(ctx.dtypes[1]), grads[1], grads[2], dw.to(w.dtype), dstate if ctx.has_state else None, None


@path("metala", "torch")
def metala_torch(
    q: Tensor, z: Tensor, v: Tensor, g: Tensor, w: Tensor, state: Tensor | None, mask: Tensor | None, segment_ids: Tensor | None, gate_round: str
) -> tuple[Tensor, Tensor]:
    """Chunked torch path. Masks and rounding, used in scoring, go through the pieces under autograd."""
    if mask is None and gate_round == "none":
        return _MetaLA.apply(q, z, v, g, w, state, segment_ids)
    log_decay, key = decay_and_key(z, gate_round)
    if mask is not None:
        keep = mask[..., None, None].to(key.dtype)
        log_decay, key = log_decay * keep, key * keep
    qw, vw = wide(q), wide(v)
    o, final = scan_chunked(qw, key, vw, log_decay, scale=q.shape[-1] ** -0.5, state=state, segment_ids=segment_ids)
    return _finish(o, qw, key, vw, g, wide(w)).to(v.dtype), final


def metala(
    q: Tensor,
    z: Tensor,
    v: Tensor,
    g: Tensor,
    w: Tensor,
    *,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    gate_round: str = "none",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`y [b, s, h, v]` in v's dtype and the state after the last token.

    mask: [b, s], 0 at padding, where the state is neither decayed nor written (v must be masked by the caller as well).
    """
    return choose("metala", backend, q.device)(q, z, v, g, w, state, mask, segment_ids, gate_round)


def metala_step(q: Tensor, z: Tensor, v: Tensor, g: Tensor, w: Tensor, state: Tensor, gate_round: str = "none") -> tuple[Tensor, Tensor]:
    """One token: q, z [b, h, k]; v, g [b, h, v]; state [b, h, k, v]. Returns y [b, h, v] and the new state."""
    log_decay, key = decay_and_key(z, gate_round)
    qw, vw = wide(q), wide(v)
    new = torch.addcmul(key.unsqueeze(-1) * vw.unsqueeze(-2), log_decay.exp().unsqueeze(-1), state)
    o = (qw.unsqueeze(-2) @ new).squeeze(-2) * q.shape[-1] ** -0.5
    return _finish(o, qw, key, vw, g, wide(w)).to(v.dtype), new
