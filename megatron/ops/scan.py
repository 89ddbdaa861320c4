"""The gated linear scan, in the two forms that define it: token by token, and quadratic.

    S_t = diag(exp(l_t)) S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t

per batch row and head, with log decays l_t <= 0 per key channel; the state is updated before it is read, so a token sees
itself (GLA, arXiv 2312.06635, equations 3 and 4; MetaLA, arXiv 2411.10741, section 4). Both forms are slow and plain on
purpose: they are what `ops/chunk.py` and the GPU kernels are tested against.

Shapes: q, k, l [b, s, h, k]; v [b, s, h, v]; state [b, h, k, v]; segment_ids [b, s]. Where segment_ids changes from one
token to the next, the state is emptied in between; an initial state belongs to the segment of the first token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops.precision import outside_autocast


@outside_autocast
def scan_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    state: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token by token. Returns `o [b, s, h, v]` and the state after the last token `[b, h, k, v]`."""
    b, s, h, dk = q.shape
    current = torch.zeros(b, h, dk, v.shape[-1], dtype=q.dtype, device=q.device) if state is None else state
    outputs = []
    for t in range(s):
        if segment_ids is not None and t > 0:
            same = (segment_ids[:, t] == segment_ids[:, t - 1]).to(q.dtype)
            current = current * same[:, None, None, None]
        current = log_decay[:, t].exp().unsqueeze(-1) * current + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], current))
    return torch.stack(outputs, dim=1) if outputs else v.new_zeros(v.shape), current


@outside_autocast
def scan_quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    state: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All pairs at once: o_t = scale * sum_{j<=t} (q_t . exp(L_t - L_j) k_j) v_j with L the running sum of log decays.

    Memory is O(s^2 k): for tests and for reading.
    """
    s = q.shape[1]
    running = log_decay.cumsum(dim=1)
    pairs = running.unsqueeze(2) - running.unsqueeze(1)  # [b, t, j, h, k]
    seen = torch.ones(s, s, dtype=torch.bool, device=q.device).tril().unsqueeze(0)
    if segment_ids is not None:
        seen = seen & (segment_ids.unsqueeze(2) == segment_ids.unsqueeze(1))
    decay = pairs.masked_fill(~seen[..., None, None], float("-inf")).exp()
    scores = torch.einsum("bthk,btjhk,bjhk->bhtj", q, decay, k)
    o = scale * torch.einsum("bhtj,bjhv->bthv", scores, v)
    last = torch.einsum("bjhk,bjhk,bjhv->bhkv", decay[:, -1], k, v)
    if state is not None:
        first = (
            torch.ones_like(running[..., :1]) if segment_ids is None else (segment_ids == segment_ids[:, :1])[..., None, None]
        )
        reach = running.exp() * first
        o = o + scale * torch.einsum("bthk,bhkv->bthv", q * reach, state)
        last = last + reach[:, -1].unsqueeze(-1) * state
    return o, last
