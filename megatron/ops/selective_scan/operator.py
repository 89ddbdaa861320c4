"""The selective scan of Mamba-1: token by token, in chunks with an exact backward, and one step.

    h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t        y_t = h_t C_t

per channel with n numbers of state (Mamba, arXiv 2312.00752, algorithm 2, with its simplified discretisation of B). Every
channel and state has its own decay, so no matrix product can replace the loop over tokens. Chunks save memory (the
states [s, d, n] exist for one chunk at a time), and all work except one multiply-add per token is vectorised over a chunk.

Shapes: u, dt, y [b, s, d] with dt > 0 (0 at padding, which does not change the state); A [d, n], negative; B, C [b, s, n];
state [b, d, n]; segment_ids [b, s], the state is reset where they change. All in fp32 (fp64 for fp64).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops.dispatch import choose, path
from megatron.ops.opaque import has_numbers, opaque, unvisited_like, visited
from megatron.ops.precision import in_accumulation_dtype, outside_autocast, sum_dtype

SSM_CHUNK = 32


def same_as_before(segment_ids: Tensor) -> Tensor:
    """[b, s] bool: False where a document begins; the first token continues the incoming state."""
    same = torch.ones_like(segment_ids, dtype=torch.bool)
    same[:, 1:] = segment_ids[:, 1:] == segment_ids[:, :-1]
    return same


@path("selective_scan", "reference")
def selective_scan_recurrent(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The formulas above, token by token, by autograd."""
    u, dt, a, b, c = (in_accumulation_dtype(x) for x in (u, dt, a, b, c))
    h = u.new_zeros(u.shape[0], *a.shape) if state is None else state
    same = None if segment_ids is None else same_as_before(segment_ids)
    outputs = []
    for t in range(u.shape[1]):
        decay = torch.exp(dt[:, t, :, None] * a)
        if same is not None:
            decay = decay * same[:, t, None, None]
        h = decay * h + (dt[:, t] * u[:, t])[..., None] * b[:, t, None]
        outputs.append((h * c[:, t, None]).sum(-1))
    return torch.stack(outputs, 1) if outputs else u, h


class _Span(NamedTuple):
    """One chunk with tokens on dim 0, over which the loop runs."""

    u: Tensor  # [c, b, d]
    dt: Tensor
    a: Tensor  # [d, n]
    b: Tensor  # [c, b, n]
    c: Tensor
    same: Tensor | None  # [c, b]


def _span(tensors: tuple[Tensor, ...], same: Tensor | None, start: int) -> _Span:
    u, dt, a, b, c = tensors
    at = (slice(None), slice(start, start + SSM_CHUNK))
    u, dt, b, c = (in_accumulation_dtype(x[at]).transpose(0, 1) for x in (u, dt, b, c))
    return _Span(u, dt, in_accumulation_dtype(a), b, c, None if same is None else same[at].transpose(0, 1))


def _states(span: _Span, start: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and states `[c, b, d, n]` of a chunk that begins from `start [b, d, n]`."""
    decay = (span.dt.unsqueeze(-1) * span.a).exp_()
    if span.same is not None:
        decay *= span.same[..., None, None]
    h = (span.dt * span.u).unsqueeze(-1) * span.b.unsqueeze(-2)
    before = start
    for t in range(len(h) if has_numbers(h) else 0):
        before = h[t].addcmul_(decay[t], before)
    return decay, h


@outside_autocast
class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def like(
        u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None, segment_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `opaque`."""
        wide = sum_dtype(u.dtype)
        return u.new_empty(u.shape, dtype=wide), u.new_empty(u.shape[0], *a.shape, dtype=wide)

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None, segment_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        wide = sum_dtype(u.dtype)
        y = torch.empty(u.shape, dtype=wide, device=u.device)
        current = torch.zeros(u.shape[0], *a.shape, dtype=wide, device=u.device) if state is None else state.to(wide)
        same = None if segment_ids is None else same_as_before(segment_ids)
        begun, starts, unvisited = dict[int, Tensor](), range(0, u.shape[1], SSM_CHUNK), list[Tensor]()
        for place, start in enumerate(visited(starts, u)):
            begun[start] = current
            span = _span((u, dt, a, b, c), same, start)
            _, h = _states(span, current)
            y[:, start : start + SSM_CHUNK] = (h @ span.c.unsqueeze(-1)).squeeze(-1).transpose(0, 1)
            current = h[-1].clone()
            unvisited += unvisited_like(starts, [current]) if place == 1 else []
        ctx.save_for_backward(u, dt, a, b, c, same)
        ctx.begun, ctx.unvisited, ctx.has_state = begun, unvisited, state is not None
        return y, current

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor | None) -> Any:
        u, dt, a, b, c, same = ctx.saved_tensors
        du, ddt, db, dc = (torch.empty_like(x) for x in (u, dt, b, c))
        da = torch.zeros_like(a, dtype=sum_dtype(a.dtype))
        after = dfinal
        for start in reversed(visited(range(0, u.shape[1], SSM_CHUNK), u)):
            at = (slice(None), slice(start, start + SSM_CHUNK))
            span = _span((u, dt, a, b, c), same, start)
            dout = in_accumulation_dtype(dy[at]).transpose(0, 1)
            decay, h = _states(span, ctx.begun[start])
            g = dout.unsqueeze(-1) * span.c.unsqueeze(-2)  # gradient of every state, computed from the last to the first
            if after is not None:
                g[-1] += after
            for t in range(len(g) - 2 if has_numbers(g) else -1, -1, -1):
                g[t].addcmul_(decay[t + 1], g[t + 1])
            after = decay[0] * g[0]
            dc[at] = (dout.unsqueeze(-2) @ h).squeeze(-2).transpose(0, 1)
            through = (g @ span.b.unsqueeze(-1)).squeeze(-1)  # gradient of dt u
            db[at] = ((span.dt * span.u).unsqueeze(-2) @ g).squeeze(-2).transpose(0, 1)
            du[at] = (through * span.dt).transpose(0, 1)
            g.mul_(decay)  # gradient of the exponent dt A
            g[0] *= ctx.begun[start]
            g[1:] *= h[:-1]
            da += (g * span.dt.unsqueeze(-1)).sum((0, 1))
            ddt[at] = torch.addcmul((g * span.a).sum(-1), through, span.u).transpose(0, 1)
        return du, ddt, da.to(a.dtype), db, dc, after if ctx.has_state else None, None


_selective_scan = opaque("selective_scan", _SelectiveScan)


@path("selective_scan", "torch")
def selective_scan_chunked(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The chunked form; see the docstring of this module."""
    return _selective_scan(u, dt, a, b, c, state, segment_ids)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`y [b, s, d]` in fp32 (fp64) and the state after the last token `[b, d, n]`."""
    return choose("selective_scan", backend, u.device)(u, dt, a, b, c, state, segment_ids)


@outside_autocast
def selective_step(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token: u, dt [b, d]; B, C [b, n]; state [b, d, n]. Returns y [b, d] and the new state."""
    u, dt, a, b, c = (in_accumulation_dtype(x) for x in (u, dt, a, b, c))
    new = torch.addcmul((dt * u)[..., None] * b[:, None], (dt.unsqueeze(-1) * a).exp(), state)
    return (new @ c.unsqueeze(-1)).squeeze(-1), new


@path("selective_scan.step", "reference")
@path("selective_scan.step", "torch")
def selective_step_torch(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, slots: Tensor | None = None
) -> Tensor:
    """The plain form of `selective_step_`."""
    y, new = selective_step(u, dt, a, b, c, state if slots is None else state[slots])
    if slots is None:
        state.copy_(new)
    else:
        state[slots] = new
    return y


def selective_step_(
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    *,
    slots: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`selective_step` with `state [slots, d, n]` (fp32) overwritten; slots [b]: row of `state` for each batch row."""
    return choose("selective_scan.step", backend, u.device)(u, dt, a, b, c, state, slots)
