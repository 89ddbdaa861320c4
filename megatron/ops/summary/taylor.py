"""Summary of Taylor linear attention (Based, JRT): the state that a shard leaves behind, and its total decay.

    A = sum_t phi(k_t)^T [g^(s-t) v_t | 1]        D = [g^s ... g^s | 1]

The fixed decay g per head touches the numerators only, so D is 1 in the denominator's column; without it there is none. A is
the operator that forms the state of JRT's prefix (`ops/taylor/prefix.py`), which keeps its inputs only.

"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops.dispatch import choose, path
from megatron.ops.precision import in_accumulation_dtype, outside_autocast, sum_dtype
from megatron.ops.summary.suffix import exclusive_sums, last_document
from megatron.ops.taylor.inputs import TaylorInputs
from megatron.ops.taylor.operator import taylor_quadratic
from megatron.ops.taylor.prefix import prefix_state


@path("taylor.summary", "reference")
def _taylor_summary_reference(
    k: Tensor, v: Tensor, segment_ids: Tensor | None, log_decay: Tensor | None, keep: Tensor | None
) -> Tensor:
    return taylor_quadratic(TaylorInputs(k, k, v, keep, log_decay, segment_ids, divide=False))[1]


@path("taylor.summary", "torch")
def taylor_summary_torch(
    k: Tensor, v: Tensor, segment_ids: Tensor | None, log_decay: Tensor | None, keep: Tensor | None
) -> Tensor:
    """The plain path."""
    return prefix_state(k, *decayed(in_accumulation_dtype(v), segment_ids, log_decay, keep))


def decayed(v: Tensor, segment_ids: Tensor | None, log_decay: Tensor | None, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values times their decay up to the end, in v's dtype, and the weight [b, s] of each token: 0 in earlier documents."""
    wide = sum_dtype(v.dtype)
    weight = last_document(segment_ids, wide)
    if weight is None:
        weight = torch.ones(v.shape[:2], dtype=wide, device=v.device)
    weight = weight if keep is None else weight * keep.to(wide)
    if log_decay is None:
        return v, weight
    return (v * exclusive_sums(log_decay.to(wide), behind=True)[0].exp().unsqueeze(-1)).to(v.dtype), weight


@outside_autocast
def taylor_summary(
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None = None,
    log_decay: Tensor | None = None,
    keep: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """What a shard leaves behind in `taylor`.

    Args:
        k: keys, [b, s, h, f].
        v: values, [b, s, h, v].
        segment_ids: document numbers of the shard, [b, s]; None without document masking.
        log_decay: constants, [1, s, h]; None for no decay.
        keep: weight of each token, [b, s], 0 or 1; None for ones.
        backend: as in `taylor`.

    Returns:
        A [b, h, e, v + 1], and D [1, h, 1, v + 1] (None without decay).
    """
    state = choose("taylor.summary", backend, k.device)(k, v, segment_ids, log_decay, keep)
    if log_decay is None:
        return state, None
    total = log_decay.to(state.dtype).sum(1)[:, :, None, None].exp()
    return state, torch.cat([total.expand(-1, -1, -1, v.shape[-1]), torch.ones_like(total)], -1)
