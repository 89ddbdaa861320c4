"""The gated linear scan of gated linear-attention mixers: `gated_scan` for a pass, `gated_scan_step` to decode.

    S_t = diag(exp(l_t)) S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t

per batch row and head, with log decays l_t <= 0 per key channel; the state is updated before it is read, so a token sees
itself (GLA, arXiv 2312.06635, equations 3 and 4; MetaLA, arXiv 2411.10741, section 4). A mixer passes q, k, v and its
gate as log decays; the operator implements document masking, padding, states and an exact backward.

Paths: `torch` is the chunked form of `ops/scan/chunk.py` with a hand-written backward, `reference` is the recurrence token
by token, against which the other forms are tested, as against the quadratic form, which computes all pairs. A fused path would
be `ops/scan/triton.py` and register itself as `@path("scan", "triton")`; until there is one, `auto` selects the chunked form
on every device, which is logged.

Shapes: q, k [b, s, h, k]; v [b, s, h, v]; log decay [b, s, h, k], or [b, s, h, 1] for one rate per head; state [b, h, k, v];
segment_ids, mask [b, s]. Where segment_ids changes from one token to the next, the state is reset in between; an initial
state belongs to the segment of the first token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops.dispatch import choose, path
from megatron.ops.precision import in_accumulation_dtype, outside_autocast, sum_dtype
from megatron.ops.scan.chunk import scan_chunked


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

    Memory is O(s^2 k): for tests and as documentation.
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


@path("scan", "reference")
def _scan_reference(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, state: Tensor | None, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    q, k, v = in_accumulation_dtype(q), in_accumulation_dtype(k), in_accumulation_dtype(v)
    return scan_recurrent(q, k, v, log_decay, scale=scale, state=state, segment_ids=segment_ids)


@path("scan", "torch")
def _scan_torch(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, state: Tensor | None, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    q, k, v = in_accumulation_dtype(q), in_accumulation_dtype(k), in_accumulation_dtype(v)
    return scan_chunked(q, k, v, log_decay, scale=scale, state=state, segment_ids=segment_ids)


def gated_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The scan over s tokens, with gradients to q, k, v, log_decay and the initial state.

    Args:
        q: queries [b, s, h, k].
        k: keys [b, s, h, k].
        v: values [b, s, h, v].
        log_decay: log of the factor that the state decays by before the token is added, [b, s, h, k] or [b, s, h, 1], at most
            0; best computed in fp32 (`F.logsigmoid(gate.float())`).
        scale: of the outputs; None is k ** -0.5.
        state: [b, h, k, v] before the first token, in fp32 (fp64 for an fp64 model); None is empty.
        mask: [b, s], 0 for padding, which neither adds to the state nor lets it decay; its outputs are undefined.
        segment_ids: [b, s], a different number for each document; None without document masking.
        backend: auto | reference | torch, see `ops/dispatch.py`.

    Returns:
        outputs [b, s, h, v] in v's dtype, and the state [b, h, k, v] after the last token, in fp32 or fp64.
    """
    log_decay = log_decay.to(sum_dtype(q.dtype)).expand(*q.shape)
    if mask is not None:
        keep = mask[..., None, None]
        k, log_decay = k * keep.to(k.dtype), log_decay * keep.to(log_decay.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, after = choose("scan", backend, q.device)(q, k, v, log_decay, scale, state, segment_ids)
    return o.to(v.dtype), after


@outside_autocast
def gated_scan_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token: `gated_scan` for s = 1 without its dimension, q, k [b, h, k], v [b, h, v], log_decay [b, h, k] or [b, h, 1].

    Returns:
        output [b, h, v] in v's dtype, and the new state [b, h, k, v]; the old one is not modified.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    added = in_accumulation_dtype(k).unsqueeze(-1) * in_accumulation_dtype(v).unsqueeze(-2)
    after = log_decay.to(added.dtype).exp().unsqueeze(-1) * state + added
    return (scale * torch.einsum("bhk,bhkv->bhv", in_accumulation_dtype(q), after)).to(v.dtype), after


def empty_scan_state(
    batch: int, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """The state [b, h, k, v] before the first token of a model in `dtype`: zeros in fp32, or fp64 for fp64."""
    return torch.zeros(batch, heads, key_dim, value_dim, dtype=sum_dtype(dtype), device=device)
