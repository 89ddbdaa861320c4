"""MicroBatchLoader for the JRT objective: a random subset of the prefix's tokens is masked, the same one for a sample in every run.

As in the code that trained the released models, every position of the prefix is masked with probability `rate` and replaced by
the mask token; its label is the original token at the same position. After the prefix the label is the next token, and
the last position of the prefix, which would predict the first token after it, is not trained. A masked token of id 0 is not
trained either (the originals test label > 0). Which positions are masked is a function of (seed, sample number) alone, so that
every mesh, every resume and every evaluation sees the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron.data.micro_batch import MicroBatch
from megatron.errors import DataError


@dataclass(frozen=True)
class Masking:
    """Masks prefixes.

    Attributes:
        prefix_length: tokens of the prefix (m).
        mask_token: id that replaces a masked token.
        rate: probability that a position is masked.
        seed: seed of the draw.
    """

    prefix_length: int
    mask_token: int
    rate: float = 0.15
    seed: int = 1234

    def hidden(self, sample_id: int) -> Tensor:
        """[prefix_length] bool: the masked positions of sample `sample_id`."""
        draw = np.random.Generator(np.random.Philox(key=[self.seed, sample_id]))
        return torch.from_numpy(draw.random(self.prefix_length) < self.rate)

    def apply(self, batch: MicroBatch) -> MicroBatch:
        """The batch with masked prefixes; tensors that change are copies.

        Raises:
            DataError: the sequence is not longer than the prefix.
        """
        m = self.prefix_length
        if batch.tokens.shape[1] <= m:
            raise DataError(
                f"samples of {batch.tokens.shape[1]} tokens leave nothing after a prefix of {m}",
                hint="lower objective_prefix_length or raise seq_length",
            )
        hidden = torch.stack([self.hidden(i) for i in batch.sample_ids])
        tokens, labels, loss_mask = batch.tokens.clone(), batch.labels.clone(), batch.loss_mask.clone()
        prefix = batch.tokens[:, :m]
        tokens[:, :m] = prefix.masked_fill(hidden, self.mask_token)
        labels[:, :m] = prefix
        loss_mask[:, :m] = (hidden & (prefix > 0)).to(loss_mask.dtype)
        return replace(batch, tokens=tokens, labels=labels, loss_mask=loss_mask)


def masked_batches(batches: Iterable[MicroBatch], masking: Masking | None) -> Iterator[MicroBatch]:
    """The batches with `masking` applied to each; unchanged if it is None."""
    return iter(batches) if masking is None else map(masking.apply, batches)
