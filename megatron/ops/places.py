"""Numbers tokens within their row or document: padding is not counted, and each document starts at 0."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.ops.context_shard import ContextShard


def numbered(
    b: int, s: int, mask: Tensor | None, segment_ids: Tensor | None, seen: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Position of each token within its document [b, s], and the number of tokens [b] of each row's last document so far.

    Args:
        b: number of rows.
        s: tokens of this pass.
        mask: [b, s], 0 for padding; None for none.
        segment_ids: [b, s] document numbers; None without document masking.
        seen: [b], tokens of the first document before this pass; None for none.
        device: device of the result.
    """
    tokens = torch.ones(b, s, dtype=torch.long, device=device) if mask is None else mask.to(device, torch.long)
    count = tokens.cumsum(1)
    if seen is not None:
        count = count + seen[:, None]
    if segment_ids is not None:  # subtract the tokens of earlier documents
        boundary = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0))
        count = count - torch.where(boundary, count - tokens, 0).cummax(1).values
    return (count - 1).clamp_min(0), count[:, -1]


def document_offset(shard: ContextShard, b: int, device: torch.device) -> Tensor:
    """[b]: tokens before a context-parallel shard, of the document of its first token; `seen` of `numbered`."""
    if shard.segment_ids is None:
        return torch.full((b,), shard.offset, dtype=torch.long, device=device)
    ids = shard.segment_ids
    return (ids[:, : shard.offset] == ids[:, shard.offset : shard.offset + 1]).sum(1)
