"""What a mixer may ask of the other shards of its rows under context parallelism.

The interface only: `parallel/context.py` communicates. Exported folders contain this file and none that needs a process group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class ContextShard(Protocol):
    """This rank's shard of every row and the exchange with the other shards; `parallel/context.py` implements it.

    Every method involves all ranks. Document boundaries are its business: nothing of another document comes in.

    Attributes:
        rank: the place of the shard in the row, from 0.
        size: shards of a row, P.
        length: tokens of a shard, s.
        offset: tokens of the row before the shard.
        segment_ids: document numbers of the whole row, [b, S]; `Context.segment_ids` are those of the shard.
    """

    rank: int
    size: int
    length: int
    offset: int
    segment_ids: Tensor | None

    def carry(self, state: Tensor, decay: Tensor | None = None, *, matrix: bool = False, reverse: bool = False) -> Tensor:
        """The state before the first token of this shard, [b, ...] in the accumulation dtype.

        Args:
            state: what the shard leaves behind if it starts from an empty state.
            decay: what the whole shard multiplies an incoming state by; broadcasts against `state`. None: 1.
            matrix: `decay` is a matrix [b, h, k, k] that multiplies the state from the left (delta rules).
            reverse: from right to left: the state behind the last token.
        """

    def carry_async(
        self, state: Tensor, decay: Tensor | None = None, *, matrix: bool = False, reverse: bool = False
    ) -> Callable[[], Tensor]:
        """`carry`, as a function that waits for the result: what is computed before it is called overlaps with the exchange.

        It must be called, once.
        """

    def halo(self, x: Tensor, n: int) -> Tensor:
        """The last n tokens before the shard, of `x [b, s, ...]` -> [b, n, ...]; zeros where nothing is visible."""

    def halo_async(self, x: Tensor, n: int) -> Callable[[], Tensor]:
        """`halo`, as a function that waits for the result; see `carry_async`."""

    def ids_with_halo(self, n: int, rows: int) -> Tensor:
        """Document numbers of those n tokens and the shard's, [rows, n + s]; hidden tokens have another than the first one."""

    def to_heads(self, x: Tensor) -> Tensor:
        """[b, s, h, k] -> [b, S, h / P, k]: all tokens of the row for this rank's share of the heads."""

    def to_tokens(self, x: Tensor) -> Tensor:
        """[b, S, h / P, k] -> [b, s, h, k]."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the shards."""
