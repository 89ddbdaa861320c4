"""Softmax attention of one new token per row over a ring of the last `w` keys and values, in place: plain form and dispatch.

    y = softmax(scale q.[k_ring, k]) [v_ring, v]      over the entries of the ring with 0 <= place and seen - place <= w

The new key and value then replace the oldest entry, whose place becomes `seen`, and `seen` is incremented. Entries may be in
any order, since `places` numbers them: nothing is moved, and no shape or address changes, so a CUDA graph can capture a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops.dispatch import choose, path
from megatron.ops.precision import sum_dtype


@path("window", "reference")
@path("window", "torch")
def window_step_torch(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, places: Tensor, seen: Tensor, scale: float
) -> Tensor:
    """The plain form of `window_step_`."""
    b, w = places.shape
    wide, share = sum_dtype(q.dtype), q.shape[1] // k.shape[1]
    every_key = torch.cat([keys, k[:, None].to(keys.dtype)], 1).to(wide).repeat_interleave(share, 2)
    every_value = torch.cat([values, v[:, None].to(values.dtype)], 1).to(wide).repeat_interleave(share, 2)
    visible = (places >= 0) & (seen[:, None] - places <= w)
    visible = torch.cat([visible, torch.ones_like(visible[:, :1])], 1)
    scores = torch.einsum("bhk,bnhk->bhn", q.to(wide) * scale, every_key)
    weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    row, oldest = torch.arange(b, device=q.device), places.argmin(1)
    keys[row, oldest], values[row, oldest], places[row, oldest] = k.to(keys.dtype), v.to(values.dtype), seen
    seen.add_(1)
    return torch.einsum("bhn,bnhk->bhk", weights, every_value).to(q.dtype)


def window_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    places: Tensor,
    seen: Tensor,
    *,
    scale: float,
    backend: str = "auto",
) -> Tensor:
    """y [b, h, d] of one token per row.

    Args:
        q: [b, h, d], h a multiple of g.
        k: [b, g, d].
        v: [b, g, d].
        keys: [b, w, g, d], changed in place.
        values: [b, w, g, d], changed in place.
        places: int64 [b, w], the position of each entry in its sequence, -1 for none; changed in place.
        seen: int64 [b], tokens of the sequence before this one; changed in place.
        scale: of the scores.
        backend: path of the operator.
    """
    return choose("window", backend, q.device)(q, k, v, keys, values, places, seen, scale)
