"""Token embedding and output matrix, which can each hold all rows of the vocabulary or one rank's block of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Module):
    """`weight [n, d]`; ids of rows that other tensor-parallel ranks hold look up zero, and `join` adds the parts.

    first_row is the first vocabulary row held here; `scale` multiplies the result (sqrt(d) where the model says so).
    """

    def __init__(self, rows: int, size: int, scale: float = 1.0) -> None:
        super().__init__()
        self.rows, self.scale, self.first_row = rows, scale, 0
        self.weight = nn.Parameter(torch.empty(rows, size))
        self.join: nn.Module = nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        """`tokens [b, s]` -> `[b, s, d]`."""
        held = self.weight.shape[0]
        if held == self.rows:
            x = F.embedding(tokens, self.weight)
        else:
            local = tokens - self.first_row
            outside = (local < 0) | (local >= held)
            x = F.embedding(local.masked_fill(outside, 0), self.weight)
            x = self.join(x.masked_fill(outside.unsqueeze(-1), 0))
        return x if self.scale == 1.0 else x * self.scale


class Head(nn.Module):
    """Logits over the vocabulary rows held here: `x [..., d]` -> `[..., n]`. `weight` may be the embedding's."""

    def __init__(self, rows: int, size: int, tied_to: Embedding | None) -> None:
        super().__init__()
        self.split: nn.Module = nn.Identity()
        self.weight = nn.Parameter(torch.empty(rows, size)) if tied_to is None else tied_to.weight

    def forward(self, x: Tensor) -> Tensor:
        """Logits in x's dtype; the loss upcasts them."""
        return F.linear(self.split(x), self.weight)
