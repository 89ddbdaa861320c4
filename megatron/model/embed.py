"""Token embedding and output projection, which can each hold all rows of the vocabulary or one rank's block of them.

Learned positions (GPT-NeoX's default, GPT-2) and a norm after the embedding (Bloom) belong here too, so that a pipeline's first
stage holds all that stands before the first block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.layers.base import Context, State
from megatron.model.norm import Norm
from megatron.ops.places import numbered


class Embedding(nn.Embedding):
    """`weight [n, d]`; ids of rows that other tensor-parallel ranks hold look up zero, and `reduce_from_tp` adds the partial
    results.

    first_row is the first vocabulary row held here; `embed_scale` multiplies the result (sqrt(d) where the model says so; PEFT
    reads the attribute by this name). places: rows of the learned position table, 0 for none; `norm` is applied last. Both are
    in `finish`. It is an `nn.Embedding` whose values are not set, so that transformers and PEFT resize and adapt it as one.
    """

    def __init__(self, rows: int, size: int, scale: float = 1.0, places: int = 0, norm: Norm | None = None) -> None:
        super().__init__(rows, size, _weight=torch.empty(rows, size))
        self.embed_scale, self.first_row = scale, 0
        self.positions = nn.Parameter(torch.empty(places, size)) if places else None
        self.norm = norm
        self.reduce_from_tp: nn.Module = nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        """`tokens [b, s]` -> `[b, s, d]`, without positions."""
        held = self.weight.shape[0]
        if held == self.num_embeddings:
            x = F.embedding(tokens, self.weight)
        else:
            local = tokens - self.first_row
            outside = (local < 0) | (local >= held)
            x = F.embedding(local.masked_fill(outside, 0), self.weight)
            x = self.reduce_from_tp(x.masked_fill(outside.unsqueeze(-1), 0))
        return x if self.embed_scale == 1.0 else x * self.embed_scale

    def finish(self, x: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """Add the learned positions to `x [b, s, d]` and norm it; what the next call must know comes back with it.

        Padding is not counted and each document starts at 0.

        Raises:
            ValueError: the text is longer than the position table, or the table was offloaded.
        """
        if self.positions is not None:
            s, rows = x.shape[1], self.positions.shape[0]
            if self.positions.is_meta and not x.is_meta:
                raise ValueError("learned positions are not in memory: a device map must not offload embed_tokens")
            if s > rows:
                raise ValueError(f"{s} tokens, but the model has learned {rows} positions (max_position_embeddings)")
            seen = None if state is None else state["seen"]
            places, after = numbered(x.shape[0], s, ctx.mask, ctx.segment_ids, seen, x.device)
            x = x + F.embedding(places, self.positions)
            state = None if state is None else {"seen": after}
        return x if self.norm is None else self.norm(x), state

    def init_state(self, batch: int, device: torch.device | str) -> list[State]:
        """The empty state in a list of one, or an empty list when there is nothing to remember."""
        return [] if self.positions is None else [{"seen": torch.zeros(batch, dtype=torch.long, device=device)}]


class Head(nn.Linear):
    """Logits over the vocabulary rows held here: `x [..., d]` -> `[..., n]`. `weight` may be the embedding's.

    An `nn.Linear` whose values are not set, so that transformers and PEFT resize and adapt it as one.
    """

    def __init__(self, rows: int, size: int, tied_to: Embedding | None) -> None:
        super().__init__(size, rows, bias=False, device="meta")
        self.copy_to_tp: nn.Module = nn.Identity()
        self.weight = nn.Parameter(torch.empty(rows, size)) if tied_to is None else tied_to.weight

    def seen(self, x: Tensor) -> Tensor:
        """What the matrix multiplies: x in the weight's dtype, behind the entry of a tensor-parallel region."""
        dtype = self.weight.dtype
        return self.copy_to_tp(x.to(dtype) if dtype.is_floating_point else x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits in x's dtype; the loss upcasts them."""
        return F.linear(self.seen(x), self.weight)
