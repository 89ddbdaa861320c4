"""Sums over the tokens behind or before each token, exclusive of it; those behind are summed from the right end.

    a_t = l_{t+1} + ... + l_s

Where a decay exp(a_t) matters, a_t is a sum of few small numbers. As a difference of running sums it would be the difference
of two large ones: over 131,072 tokens in fp32 exp(a_t) is then wrong by 4e-4, here by 4e-8.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SUM_CHUNK = 64
"""Tokens whose sums are one product with a triangular matrix."""


def exclusive_sums(x: Tensor, behind: bool) -> tuple[Tensor, Tensor]:
    """Sums of `x [b, s, m]` over the tokens behind (or before) each token, [b, s, m], and over all tokens, [b, m]."""
    s = x.shape[1]
    fill = -s % _SUM_CHUNK if s > _SUM_CHUNK else 0
    chunks = (F.pad(x, (0, 0, fill, 0)) if fill else x).unflatten(1, (-1, min(s, _SUM_CHUNK)))
    ones = torch.ones(chunks.shape[2], chunks.shape[2], dtype=x.dtype, device=x.device)
    sums = (ones.triu_(1) if behind else ones.tril_(-1)) @ chunks
    totals = chunks.sum(2)
    running = totals.flip(1).cumsum(1).flip(1) if behind else totals.cumsum(1)
    if behind:
        sums[:, :-1] += running[:, 1:, None]
    else:
        sums[:, 1:] += running[:, :-1, None]
    return sums.flatten(1, 2)[:, fill:], running[:, 0 if behind else -1]


def runs_from_the_right(s: int, size: int) -> list[slice]:
    """Runs of `size` tokens, the last one first; what remains of `s` is the first run of the shard."""
    return [slice(max(0, stop - size), stop) for stop in range(s, 0, -size)]


def last_document(segment_ids: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """[b, s] of 1 for tokens of the document in which the shard ends, else 0; None: one document."""
    return None if segment_ids is None else (segment_ids == segment_ids[:, -1:]).to(dtype)
