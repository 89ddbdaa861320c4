"""Context-parallel shards for a plan: they communicate with nobody, and count what a rank would send.

A plan runs a block once on fake tensors with such a shard, so that its memory includes the summaries and gathered states of
context parallelism and its traffic follows from what the mixer asks for, without a formula per mixer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops.precision import outside_autocast
from megatron.parallel.context import ContextParallel
from megatron.parallel.context_messages import Wait
from megatron.parallel.context_shards import ContextShards
from megatron.parallel.mesh import Mesh


class Traffic:
    """Bytes that a rank sends.

    Attributes:
        sent: so far; of a rank with a neighbour on either side.
    """

    def __init__(self) -> None:
        self.sent = 0.0


class PlannedShard(ContextParallel):
    """A shard whose messages have the right shapes and no content."""

    traffic: Traffic

    def start_all_gather(self, x: Tensor) -> Wait:
        """`size - 1` ranks get this rank's `x`."""
        self.traffic.sent += (self.size - 1) * x.nbytes
        gathered = x.new_empty(self.size, *x.shape)
        return lambda: gathered

    def start_shift(self, x: Tensor, by: int) -> Wait:
        """One neighbour gets it."""
        self.traffic.sent += x.nbytes
        received = torch.zeros_like(x)
        return lambda: received

    def to_heads(self, x: Tensor) -> Tensor:
        """All but this rank's part of the heads is sent."""
        return _Counted.apply(x.unflatten(2, (self.size, -1)).movedim(2, 1).flatten(1, 2), self)

    def to_tokens(self, x: Tensor) -> Tensor:
        """All but this rank's part of the tokens is sent."""
        return _Counted.apply(x.unflatten(1, (self.size, -1)).movedim(1, 2).flatten(2, 3), self)

    def sum(self, x: Tensor) -> Tensor:
        """A ring all-reduce sends twice what an all-to-all of the same tensor does."""
        return _Counted.apply(_Counted.apply(x, self), self)


@outside_autocast
class _Counted(torch.autograd.Function):
    """The identity in a new tensor; both directions send all but one of `size` equal parts."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, shard: PlannedShard) -> Tensor:
        ctx.shard = shard  # type: ignore[attr-defined]
        return _Counted.send(x, shard)

    @staticmethod
    def send(x: Tensor, shard: PlannedShard) -> Tensor:
        """Count and copy."""
        shard.traffic.sent += x.nbytes * (shard.size - 1) / shard.size
        return x.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        return _Counted.send(grads[0], ctx.shard), None  # type: ignore[attr-defined]


class PlannedShards(ContextShards):
    """Builds planned shards; see `ContextShards`.

    Attributes:
        traffic: of all shards built so far.
    """

    def __init__(self, mesh: Mesh, seq_length: int, exchange: str) -> None:
        super().__init__(mesh, seq_length, exchange)
        self.traffic = Traffic()

    def build(self, rows: int, segment_ids: Tensor | None, device: torch.device) -> ContextParallel:
        """The last shard of a row, which folds the most states."""
        size = self.mesh.cp
        shard = PlannedShard(None, size - 1, size, rows, self.length, segment_ids, exchange=self.exchange, device=device)
        shard.traffic = self.traffic
        return shard
