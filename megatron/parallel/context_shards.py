"""The context-parallel shards of the micro batches that pass through the stages of one rank.

A block asks for the shard of its micro batch. It is built once per pass of a micro batch through a rank's stages, forward or
recomputed, and not once per block: consecutive blocks pass the same tensor of segment ids. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.parallel.context import ContextParallel
from megatron.parallel.mesh import Mesh


class ContextShards:
    """Builds the `ContextParallel` of a micro batch, and its part of the segment ids.

    Args:
        mesh: position of the rank; its context-parallel size is above 1.
        seq_length: tokens of a row.
        exchange: see `parallel/context.py`.
    """

    def __init__(self, mesh: Mesh, seq_length: int, exchange: str = "all_gather") -> None:
        self.mesh, self.length, self.exchange = mesh, seq_length // mesh.cp, exchange
        self._last: tuple[tuple[int, torch.device], Tensor | None, ContextParallel, Tensor | None] | None = None

    def of(self, rows: int, segment_ids: Tensor | None, device: torch.device) -> tuple[ContextParallel, Tensor | None]:
        """The shard of a micro batch, and the segment ids of its tokens [b, s].

        Args:
            rows: rows of the micro batch (b).
            segment_ids: document numbers of the whole rows [b, seq_length]; None without document masking.
            device: of the hidden states.
        """
        if self._last is not None:
            place, whole, shard, local = self._last
            if whole is segment_ids and place == (rows, device):
                return shard, local
        shard = self.build(rows, segment_ids, device)
        local = None
        if shard.segment_ids is not None:
            local = shard.segment_ids[:, shard.offset : shard.offset + shard.length].contiguous()
        self._last = (rows, device), segment_ids, shard, local
        return shard, local

    def build(self, rows: int, segment_ids: Tensor | None, device: torch.device) -> ContextParallel:
        """A shard that communicates with the other ranks of the context-parallel group."""
        mesh = self.mesh
        return ContextParallel(
            mesh.cp_group, mesh.cp_rank, mesh.cp, rows, self.length, segment_ids, exchange=self.exchange, device=device
        )
