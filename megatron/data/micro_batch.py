"""The one type of a micro batch: made by the loader (`data/batches.py`), read by engines and losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
        sample_ids: the global sample numbers, b of them; empty where the samples have none.
        inputs: what single kinds of mixers read beside the tokens (`Layer.Inputs`), by name: tensors [b, s] or numbers.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    segment_ids: torch.Tensor | None = None
    sample_ids: list[int] = field(default_factory=list)
    inputs: Mapping[str, torch.Tensor | int] = field(default_factory=dict)
