"""The one type of a micro batch: made by the loader (`data/batches.py`), read by engines and losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch


@dataclass(frozen=True)
class MicroBatch:
    """One micro batch of one rank, on the CPU.

    Attributes:
        tokens: i64 [b, s], what the model reads.
        labels: i64 [b, s], the token after each of them.
        loss_mask: f32 [b, s], 0 where the loss is not counted (the label there is 0 if the target was negative).
        segment_ids: i32 [b, s], number of end-of-document tokens before the position (such a token belongs to the document it
            ends), or None where boundaries are ignored.
            Also of a shard it is that of the whole row.
        sample_ids: the global sample numbers, b of them; empty where the samples have none.
        inputs: what single kinds of mixers read beside the tokens (`Layer.Inputs`), by name: tensors [b, s] or numbers.
        offset: tokens of the row before the first of these: 0, except in a shard.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    segment_ids: torch.Tensor | None = None
    sample_ids: list[int] = field(default_factory=list)
    inputs: Mapping[str, torch.Tensor | int] = field(default_factory=dict)
    offset: int = 0

    def shard(self, rank: int, size: int) -> MicroBatch:
        """The contiguous tokens of one context-parallel rank, with their labels, weights and inputs.

        All of these were made on the whole row, so that the last token of a shard keeps its label, the first token of the next.

        Args:
            rank: place of the shard.
            size: shards of a row; it divides the length.
        """
        length = self.tokens.shape[1] // size
        at = slice(rank * length, (rank + 1) * length)
        inputs = {name: value[:, at] if isinstance(value, torch.Tensor) else value for name, value in self.inputs.items()}
        return replace(
            self,
            tokens=self.tokens[:, at],
            labels=self.labels[:, at],
            loss_mask=self.loss_mask[:, at],
            inputs=inputs,
            offset=self.offset + at.start,
        )
