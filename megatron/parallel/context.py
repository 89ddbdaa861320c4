"""Context parallelism: every row is split into contiguous shards, one per rank; mixers exchange states and halos, not tokens.

`ContextParallel` is the `ContextShard` of `layers/base.py` that communicates. What a linear-attention layer needs from the left
is its recurrent state and a few tokens, so a message does not grow with the sequence (LASP-2, arXiv 2502.07563, gathers the
states of linear attention in the same way). A shard that starts from an empty state leaves A behind and shrinks what comes in
by D, so the state before shard r is S_r = D_(r-1) S_(r-1) + A_(r-1), an exclusive scan over the ranks; its backward is the same
scan from the other end. Two exchanges compute it:

    all_gather  one collective, folded locally: (P - 1)(|A| + |D|) elements sent forward, (P - 1)|A| backward
    scan        log2 P rounds of point-to-point messages and a last one: ceil(log2 P)(|A| + |D|) + |A| in either direction

Documents need no message: every rank holds the segment ids of the whole row, from which two factors per rank follow. `enters`
is 1 if the token before the shard belongs to the document of its first token, `through` if in addition the shard is a single
document. Both are computed without a device synchronisation, once per micro batch.

`context_exchange.py` has the gradients of the exchanges and lets them overlap with what a layer computes meanwhile,
`context_messages.py` the collectives.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.ops.precision import in_accumulation_dtype
from megatron.parallel.context_exchange import Carry, Halo, all_reduce, all_to_all, start_exchange
from megatron.parallel.context_messages import ContextMessages, Wait

EXCHANGES = ("all_gather", "scan")


class ContextParallel(ContextMessages):
    """This rank's shard of every row of a micro batch; see `ContextShard` in `layers/base.py` for the methods.

    Attributes:
        offset: tokens of the row before the shard.
        enters: see the head of this file, [P, b]; None for ones. `enters_reversed`: as seen from the right.
        through: as `enters`.
    """

    def __init__(
        self,
        group: ProcessGroup | None,
        rank: int,
        size: int,
        rows: int,
        length: int,
        segment_ids: Tensor | None = None,
        exchange: str = "all_gather",
        device: torch.device | str | None = None,
    ) -> None:
        """A shard of `rows` rows.

        Args:
            group: the context-parallel group; None is the default group.
            rank: rank in the group.
            size: ranks of the group.
            rows: rows of the micro batch, b.
            length: tokens per row and rank, s.
            segment_ids: document numbers of the whole row, [b, size * length]; None without document masking.
            exchange: all_gather | scan.
            device: of the hidden states; None is that of `segment_ids`.

        Raises:
            ValueError: an unknown exchange, or segment ids that are not those of the whole row.
        """
        if exchange not in EXCHANGES:
            raise ValueError(f"the exchange of states is one of {', '.join(EXCHANGES)}, got {exchange!r}")
        if segment_ids is not None and tuple(segment_ids.shape) != (rows, size * length):
            raise ValueError(f"segment_ids must be [{rows}, {size * length}], the whole row, got {tuple(segment_ids.shape)}")
        super().__init__(group, rank, size)
        self.length, self.exchange = length, exchange
        self.offset = rank * length
        self.device = device if device is not None or segment_ids is None else segment_ids.device
        self.segment_ids = None if segment_ids is None else segment_ids.to(self.device, non_blocking=True)
        self._ids: dict[int, Tensor] = {}
        self.enters, self.through = self._factors(reverse=False)
        self.enters_reversed, self.through_reversed = self._factors(reverse=True)

    def _factors(self, reverse: bool) -> tuple[Tensor | None, Tensor | None]:
        """`enters` and `through` of every rank, [P, b] of 0 and 1, as seen from the left or from the right; None: all 1."""
        if self.segment_ids is None:
            return None, None
        shards = self.segment_ids.unflatten(1, (self.size, self.length))
        first, last = shards[:, :, 0].t(), shards[:, :, -1].t()
        joined = (first[1:] == last[:-1]).float()  # of shards r - 1 and r
        border = torch.zeros_like(joined[:1]) if self.size > 1 else torch.zeros_like(first, dtype=torch.float32)
        enters = torch.cat([joined, border] if reverse else [border, joined])
        return enters, enters * (first == last)

    def carry_async(self, state: Tensor, decay: Tensor | None = None, *, matrix: bool = False, reverse: bool = False) -> Wait:
        """`carry`, as a function that waits for the result."""
        state = in_accumulation_dtype(state).contiguous()
        decay = None if decay is None else decay.to(state.dtype).contiguous()
        factors = (self.enters_reversed, self.through_reversed) if reverse else (self.enters, self.through)
        matrix = matrix and decay is not None
        return start_exchange(Carry(self, factors, matrix, reverse, scan=self.exchange == "scan"), state, decay)

    def carry(self, state: Tensor, decay: Tensor | None = None, *, matrix: bool = False, reverse: bool = False) -> Tensor:
        """The state before the first token of this shard (`reverse`: behind its last token, from the right)."""
        return self.carry_async(state, decay, matrix=matrix, reverse=reverse)()

    def halo_async(self, x: Tensor, n: int) -> Wait:
        """`halo`, as a function that waits for the result."""
        if not 0 < n <= self.length:
            raise ValueError(f"a halo of {n} tokens needs a shard of at least as many; it has {self.length}")
        return start_exchange(Halo(self, n, self.halo_hidden(n, x.shape[0])), x)

    def halo(self, x: Tensor, n: int) -> Tensor:
        """The last `n` tokens before this shard, [b, n, ...]; zeros where they are of another document or do not exist."""
        return self.halo_async(x, n)()

    def ids_with_halo(self, n: int, rows: int) -> Tensor:
        """Document numbers of the halo and the shard, [b, n + s], formed once; the first rank's halo is another document."""
        if n not in self._ids:
            if self.segment_ids is None:
                own = torch.zeros(rows, self.length, dtype=torch.int32, device=self.device)
            else:
                own = self.segment_ids[:, self.offset : self.offset + self.length]
            halo = own[:, :1].expand(-1, n)
            if self.rank == 0:
                halo = halo - 1
            elif self.segment_ids is not None:
                halo = self.segment_ids[:, self.offset - n : self.offset]
            self._ids[n] = torch.cat([halo, own], 1)
        return self._ids[n]

    def halo_hidden(self, n: int, rows: int) -> Tensor | None:
        """[b, n], True where a token of the halo is not visible; None if all are."""
        if self.rank == 0:
            return torch.ones(rows, n, dtype=torch.bool, device=self.device)
        if self.segment_ids is None:
            return None
        return self.segment_ids[:, self.offset - n : self.offset] != self.segment_ids[:, self.offset : self.offset + 1]

    def to_heads(self, x: Tensor) -> Tensor:
        """All heads of the shard's tokens [b, s, h, k] -> all tokens of the row for h / P heads, [b, S, h / P, k]."""
        if x.shape[2] % self.size:
            raise ValueError(f"{x.shape[2]} heads cannot be divided among {self.size} context-parallel ranks")
        return all_to_all(x, self, True)

    def to_tokens(self, x: Tensor) -> Tensor:
        """The inverse of `to_heads`: [b, S, h / P, k] -> [b, s, h, k]."""
        return all_to_all(x, self, False)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over the shards, on every rank."""
        return all_reduce(x, self)
