"""Summary of Mamba's selective scan: the state that a shard leaves behind, and its total decay.

    A = sum_t exp(a_t A_rates) dt_t u_t B_t        D = exp((dt_1 + ... + dt_s) A_rates)        a_t = dt_{t+1} + ... + dt_s

per channel and state. Relative to the end no token depends on another, so the loop over tokens of the scan is not needed. The
hand-written backward keeps the inputs and one sum per block. On a GPU the fused scan itself is faster: its first pass is kept.

Shapes as in `ops/selective_scan/operator.py`: u, dt [b, s, d], rates [d, n], B [b, s, n], A and D [b, d, n].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops.dispatch import choose, path
from megatron.ops.precision import in_accumulation_dtype, outside_autocast, sum_dtype
from megatron.ops.selective_scan.operator import selective_scan, selective_scan_recurrent
from megatron.ops.summary.suffix import exclusive_sums, last_document, runs_from_the_right

_BLOCK_STATES = 32
"""Tokens of a block, whose states [b, tokens, d, n] exist at the same time."""


@outside_autocast
class _SelectiveSummary(torch.autograd.Function):
    @staticmethod
    def block(at: slice, u: Tensor, dt: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """dt, u without tokens of earlier documents, and dt u, [b, c, d] in the accumulation dtype."""
        dt, u = in_accumulation_dtype(dt[:, at]), in_accumulation_dtype(u[:, at])
        u = u if last is None else u * last[:, at, None]
        return dt, u, dt * u

    @staticmethod
    def forward(ctx: Any, u: Tensor, dt: Tensor, rates: Tensor, b: Tensor, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        wide = sum_dtype(u.dtype)
        a, last = in_accumulation_dtype(rates), last_document(segment_ids, wide)
        state = torch.zeros(u.shape[0], *rates.shape, dtype=wide, device=u.device)
        behind, right_sums = torch.zeros(u.shape[0], u.shape[2], dtype=wide, device=u.device), []
        for at in runs_from_the_right(u.shape[1], _BLOCK_STATES):
            right_sums.append(behind)
            steps, _, written = _SelectiveSummary.block(at, u, dt, last)
            sums, total = exclusive_sums(steps, behind=True)
            factor = (sums.add_(behind.unsqueeze(1)).unsqueeze(-1) * a).exp_()
            state += factor.mul_(written.unsqueeze(-1)).mul_(in_accumulation_dtype(b[:, at]).unsqueeze(2)).sum(1)
            behind = behind + total
        decay = (behind.unsqueeze(-1) * a).exp_()
        ctx.save_for_backward(u, dt, rates, b, segment_ids, decay, behind, torch.stack(right_sums))
        return state, decay

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, dt, rates, b, segment_ids, decay, total_dt, right_sums = ctx.saved_tensors
        du, ddt, db = torch.empty_like(u), torch.empty_like(dt), torch.empty_like(b)
        a, last = in_accumulation_dtype(rates), last_document(segment_ids, decay.dtype)
        dstate, dexponent = grads[0], grads[1] * decay
        da = (dexponent * total_dt.unsqueeze(-1)).sum(0)
        before = (dexponent * a).sum(-1)  # gradient of every step size through D, then of those behind through A
        for at, behind in reversed(list(zip(runs_from_the_right(u.shape[1], _BLOCK_STATES), right_sums, strict=True))):
            steps, values, written = _SelectiveSummary.block(at, u, dt, last)
            sums = exclusive_sums(steps, behind=True)[0].add_(behind.unsqueeze(1))
            factor = (sums.unsqueeze(-1) * a).exp_().mul_(dstate.unsqueeze(1))
            through = (factor @ in_accumulation_dtype(b[:, at]).unsqueeze(-1)).squeeze(-1)  # gradient of dt u
            db[:, at] = (written.unsqueeze(-2) @ factor).squeeze(-2)
            du[:, at] = through * steps if last is None else through * steps * last[:, at, None]
            factor.mul_(written.unsqueeze(-1)).mul_(in_accumulation_dtype(b[:, at]).unsqueeze(2))
            da += (factor * sums.unsqueeze(-1)).sum((0, 1))
            earlier, total = exclusive_sums((factor * a).sum(-1), behind=False)
            ddt[:, at] = earlier.add_(before.unsqueeze(1)).addcmul_(through, values)
            before = before + total
        return du, ddt, da.to(rates.dtype), db, None


@path("selective_scan.summary", "reference")
def _selective_summary_reference(
    u: Tensor, dt: Tensor, rates: Tensor, b: Tensor, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    _, state = selective_scan_recurrent(u, dt, rates, b, b, None, segment_ids)
    return state, _total_decay(dt, rates)


@path("selective_scan.summary", "torch")
def _selective_summary_torch(
    u: Tensor, dt: Tensor, rates: Tensor, b: Tensor, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _SelectiveSummary.apply(u, dt, rates, b, segment_ids)


@path("selective_scan.summary", "triton")
def _selective_summary_fused(
    u: Tensor, dt: Tensor, rates: Tensor, b: Tensor, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    _, state = selective_scan(u, dt, rates, b, b, segment_ids=segment_ids, backend="triton")
    return state, _total_decay(dt, rates)


@outside_autocast
def _total_decay(dt: Tensor, rates: Tensor) -> Tensor:
    """D by autograd."""
    return (in_accumulation_dtype(dt).sum(1).unsqueeze(-1) * in_accumulation_dtype(rates)).exp()


def selective_summary(
    u: Tensor, dt: Tensor, rates: Tensor, b: Tensor, segment_ids: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """What a shard leaves behind in `selective_scan`, A and D [b, d, n]; arguments as there."""
    return choose("selective_scan.summary", backend, u.device)(u, dt, rates, b, segment_ids)
