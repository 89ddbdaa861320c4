"""Token embedding and output projection, with all rows of the vocabulary or one tensor-parallel rank's shard of them.

Learned positions (GPT-NeoX's default, GPT-2) and a norm after the embedding (Bloom) belong here too, so that a pipeline's first
stage contains everything before the first block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.layers.base import Context, State
from megatron.model.norm import Norm
from megatron.ops.places import document_offset, numbered


class Embedding(nn.Embedding):
    """`weight [n, d]`; ids of other tensor-parallel ranks' rows give zeros, and `reduce_from_tp` sums the partial results.

    A subclass of `nn.Embedding`, so that transformers and PEFT can resize and adapt it. Its values are not initialised here.

    Attributes:
        first_row: first vocabulary row of this rank's shard.
        embed_scale: factor of the result, such as sqrt(d); PEFT reads the attribute by this name.
        positions: table of `places` learned positions, added in `finish`; None for none.
        norm: applied at the end of `finish`; None for none.
    """

    def __init__(self, rows: int, size: int, scale: float = 1.0, places: int = 0, norm: Norm | None = None) -> None:
        super().__init__(rows, size, _weight=torch.empty(rows, size))
        self.embed_scale, self.first_row = scale, 0
        self.positions = nn.Parameter(torch.empty(places, size)) if places else None
        self.norm = norm
        self.reduce_from_tp: nn.Module = nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        """`tokens [b, s]` -> `[b, s, d]`, without positions."""
        local_rows = self.weight.shape[0]
        if local_rows == self.num_embeddings:
            x = F.embedding(tokens, self.weight)
        else:
            local = tokens - self.first_row
            outside = (local < 0) | (local >= local_rows)
            x = F.embedding(local.masked_fill(outside, 0), self.weight)
            x = self.reduce_from_tp(x.masked_fill(outside.unsqueeze(-1), 0))
        return x if self.embed_scale == 1.0 else x * self.embed_scale

    def finish(self, x: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """Add the learned positions to `x [b, s, d]` and apply the norm.

        Padding is not counted and each document starts at position 0.

        Returns:
            The result, and the state for the next call.

        Raises:
            ValueError: the text is longer than the position table, or the table was offloaded.
        """
        if self.positions is not None:
            s, rows = x.shape[1], self.positions.shape[0]
            if self.positions.is_meta and not x.is_meta:
                raise ValueError("learned positions are not in memory: a device map must not offload embed_tokens")
            length = s if ctx.cp is None else ctx.cp.size * s
            if length > rows:
                raise ValueError(f"{length} tokens, but the model has learned {rows} positions (max_position_embeddings)")
            seen = None if state is None else state["seen"]
            if ctx.cp is not None:
                seen = document_offset(ctx.cp, x.shape[0], x.device)
            places, after = numbered(x.shape[0], s, ctx.mask, ctx.segment_ids, seen, x.device)
            x = x + F.embedding(places, self.positions)
            state = None if state is None else {"seen": after}
        return x if self.norm is None else self.norm(x), state

    def init_state(self, batch: int, device: torch.device | str) -> list[State]:
        """A list with the empty state, or an empty list if the model has no learned positions."""
        return [] if self.positions is None else [{"seen": torch.zeros(batch, dtype=torch.long, device=device)}]


class Head(nn.Linear):
    """Logits over this rank's vocabulary rows: `x [..., d]` -> `[..., n]`. `weight` may be the embedding's.

    A subclass of `nn.Linear`, so that transformers and PEFT can resize and adapt it. Its values are not initialised here.
    """

    def __init__(self, rows: int, size: int, tied_to: Embedding | None) -> None:
        super().__init__(size, rows, bias=False, device="meta")
        self.copy_to_tp: nn.Module = nn.Identity()
        self.weight = nn.Parameter(torch.empty(rows, size)) if tied_to is None else tied_to.weight

    def projection_input(self, x: Tensor) -> Tensor:
        """The input of the projection: x in the weight's dtype, after the entry of a tensor-parallel region."""
        dtype = self.weight.dtype
        return self.copy_to_tp(x.to(dtype) if dtype.is_floating_point else x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits in x's dtype; the loss upcasts them."""
        return F.linear(self.projection_input(x), self.weight)
