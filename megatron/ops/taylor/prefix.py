"""Prefix linear attention (JRT): causal Taylor attention plus keys of a prefix that every query sees (arXiv 2407.05483).

    y_i = [ sum_{j<=i} p(q_i, k_j) v_j + sum_{j<m} p(q_i, k'_j) v'_j ] / [ the same sums without v ]      for every i, i < m too

k', v' are second keys and values of the first m tokens. All queries see the whole prefix, so its state
S' = sum_{j<m} phi(k'_j)^T [v'_j | 1] is formed once and the causal scan starts from it: O(s), and the state that comes out is
the sum of both, which is all that decoding needs.

Documents inside a prefix see their own part of it only. Then the prefix's sum is a causal scan plus a scan from the right that
leaves the token itself out, both of them linear too.

`TaylorInputs` are those of the causal part; k2, v2 [b, m, h, .] are the prefix's; inside [b, m] is 1 for tokens of the prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops.dispatch import choose, path
from megatron.ops.opaque import has_numbers, opaque
from megatron.ops.precision import in_accumulation_dtype, outside_autocast, sum_dtype
from megatron.ops.taylor.features import (
    feature_count,
    features_by_definition,
    taylor_features,
    taylor_features_backward,
)
from megatron.ops.taylor.inputs import TaylorInputs
from megatron.ops.taylor.operator import (
    TAYLOR_CHUNK,
    empty_taylor_state,
    normalised,
    taylor_chunked,
    taylor_quadratic,
    values_and_one,
)

CausalScan = Callable[[TaylorInputs], tuple[Tensor, Tensor]]


def _values_beside_one(v: Tensor, weight: Tensor) -> Tensor:
    """[v | 1] times the weight of each token: `[b, s, h, v]` and `[b, s]` -> `[b, h, s, v + 1]`."""
    return values_and_one(v, weight[..., None, None]).transpose(1, 2)


@outside_autocast
class _PrefixState(torch.autograd.Function):
    """sum_j phi(k_j)^T [v_j | 1] w_j, chunk by chunk; keeps its inputs alone."""

    @staticmethod
    def like(k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        """See `opaque`."""
        b, _, h, f = k.shape
        return k.new_empty(b, h, feature_count(f), v.shape[-1] + 1, dtype=sum_dtype(k.dtype))

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(k, v, weight)
        b, m, h, f = k.shape
        total = empty_taylor_state(b, h, f, v.shape[-1], k.dtype, k.device)
        for t in range(0, m if has_numbers(k) else min(m, TAYLOR_CHUNK), TAYLOR_CHUNK):
            at = (slice(None), slice(t, t + TAYLOR_CHUNK))
            phi = taylor_features(in_accumulation_dtype(k[at]).transpose(1, 2) * f**-0.25)
            total += phi.transpose(-1, -2) @ _values_beside_one(v[at], weight[at])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> Any:
        k, v, weight = ctx.saved_tensors
        dk, dv, f = torch.empty_like(k), torch.empty_like(v), k.shape[-1]
        for t in range(0, k.shape[1] if has_numbers(k) else min(k.shape[1], TAYLOR_CHUNK), TAYLOR_CHUNK):
            at = (slice(None), slice(t, t + TAYLOR_CHUNK))
            y = in_accumulation_dtype(k[at]).transpose(1, 2) * f**-0.25
            dphi = _values_beside_one(v[at], weight[at]) @ dtotal.transpose(-1, -2)
            dk[at] = (taylor_features_backward(y, dphi) * f**-0.25).transpose(1, 2)
            du = (taylor_features(y) @ dtotal)[..., :-1].transpose(1, 2)
            dv[at] = du * weight[at][..., None, None].to(du.dtype)
        return dk, dv, None


prefix_state = opaque("prefix_state", _PrefixState)
"""(k, v, weight) -> the state of a text alone; also what a context-parallel shard leaves behind."""


def _padded(x: Tensor, s: int) -> Tensor:
    """`[b, m, ...]` -> `[b, s, ...]` with zeros behind."""
    return F.pad(x, [0, 0] * (x.dim() - 2) + [0, s - x.shape[1]])


@path("taylor.prefix", "reference")
@outside_autocast
def prefix_quadratic(
    x: TaylorInputs, k2: Tensor, v2: Tensor, inside: Tensor, behind: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All pairs at once, by autograd: the causal form twice over, once from the left and once from the right."""
    q, k, v, keep, _, segment_ids, state, _ = x
    sums, end = taylor_quadratic(TaylorInputs(q, k, v, keep, None, segment_ids, state, False))
    m, scale = k2.shape[1], q.shape[-1] ** -0.5
    scores = torch.einsum("bihf,bjhf->bhij", in_accumulation_dtype(q), in_accumulation_dtype(k2)) * scale
    seen = inside[:, None, None].to(scores.dtype)
    if segment_ids is not None:
        seen = seen * (segment_ids[:, None, :, None] == segment_ids[:, None, None, :m]).to(scores.dtype)
    u = _values_beside_one(v2, torch.ones_like(inside))
    sums = sums + ((1 + scores + scores * scores / 2) * seen @ u).transpose(1, 2)
    if behind is not None:
        last = torch.ones(q.shape[:2], device=q.device) if segment_ids is None else segment_ids == segment_ids[:, -1:]
        phi = features_by_definition(in_accumulation_dtype(q) * q.shape[-1] ** -0.25)
        sums = sums + torch.einsum("bshe,bhev->bshv", phi, behind) * last[..., None, None].to(sums)
    last = inside if segment_ids is None else inside * (segment_ids[:, :m] == segment_ids[:, -1:]).to(inside.dtype)
    return normalised(sums).to(v.dtype), end + prefix_state(k2, v2, last)


@path("taylor.prefix", "torch")
def prefix_chunked(
    x: TaylorInputs, k2: Tensor, v2: Tensor, inside: Tensor, behind: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The chunked form; see the head of this file."""
    return prefix_scan(taylor_chunked, prefix_state, x, k2, v2, inside, behind)


def prefix_scan(
    scan: CausalScan,
    state_of: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: TaylorInputs,
    k2: Tensor,
    v2: Tensor,
    inside: Tensor,
    behind: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One prefix state and one causal scan that starts from it; with documents three scans: the text, the prefix from the left
    and the prefix from the right. `scan` is a path of `taylor`, `behind` see `prefix_taylor`.
    """
    q, k, v, keep, _, segment_ids, state, _ = x
    if segment_ids is None:
        start = state_of(k2, v2, inside)
        start = start if behind is None else start + behind
        return scan(TaylorInputs(q, k, v, keep, state=start if state is None else start + state))
    s, m = q.shape[1], k2.shape[1]
    sums, end = scan(TaylorInputs(q, k, v, keep, None, segment_ids, state, False))
    prefix = TaylorInputs(q, _padded(k2, s), _padded(v2, s), _padded(inside, s), None, segment_ids, divide=False)
    left, left_end = scan(prefix)
    sums = sums + left
    if m:
        sums = sums + _padded(_from_the_right(scan, q[:, :m], k2, v2, inside, segment_ids[:, :m], behind), s)
    return normalised(sums).to(v.dtype), end + left_end


def _from_the_right(
    scan: CausalScan, q: Tensor, k: Tensor, v: Tensor, inside: Tensor, ids: Tensor, behind: Tensor | None
) -> Tensor:
    """Sums over j > i inside the prefix and the document, `[b, m, h, v + 1]`; `behind` belongs to the last token's document.

    The causal scan runs over the reversed tokens, with every key moved one place on, so that position i sees j > i only; a key
    that would move over a boundary is dropped.
    """
    ids = ids.flip(1)
    k, v = (F.pad(x.flip(1)[:, :-1], (0, 0, 0, 0, 1, 0)) for x in (k, v))
    weight = F.pad(inside.flip(1)[:, :-1] * (ids[:, 1:] == ids[:, :-1]), (1, 0))
    sums, _ = scan(TaylorInputs(q.flip(1), k, v, weight, None, ids, behind, False))
    return sums.flip(1)


def prefix_taylor(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k2: Tensor,
    v2: Tensor,
    inside: Tensor,
    *,
    state: Tensor | None = None,
    behind: Tensor | None = None,
    keep: Tensor | None = None,
    segment_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`y [b, s, h, v]` in v's dtype and the state after the last token, prefix and causal part in one `[b, h, e, v + 1]`.

    Under context parallelism `behind` is the state of the prefix tokens to the right of this pass, of the last token's
    document; the state that comes out then contains it only without documents, and has no reader.
    """
    x = TaylorInputs(q, k, v, keep, None, segment_ids, state)
    return choose("taylor.prefix", backend, q.device)(x, k2, v2, inside, behind)
