"""From a global sample number to the tensors of one rank; the number is the whole cursor of the data.

Global micro batch k holds samples `[k * micro * dp, (k + 1) * micro * dp)` and data-parallel rank r takes its contiguous slice,
as in NeoX. What a step sees depends on the global batch only, never on how many ranks share it, so a run can go on with another
number of ranks, another micro batch, or another batch size, without repeating or leaving out a sample.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron.data.datasets import BlendedDataset, Dataset, PackedDataset, Sample
from megatron.data.micro_batch import MicroBatch
from megatron.data.streaming import StreamDataset
from megatron.errors import DataError

__all__ = ["BlendedDataset", "Dataset", "MicroBatchLoader", "PackedDataset", "cu_seqlens"]


class MicroBatchLoader:
    """Iterates over this rank's micro batches, from `next_sample` to the last whole global batch.

    Args:
        dataset: where samples come from.
        micro_batch: samples per rank and micro batch (b).
        data_rank, data_size: place in, and size of, the data-parallel group.
        gradient_accumulation: micro batches per step; data end with a whole step.
        start_sample: first global sample number, the cursor of a checkpoint.
        eod_token: id that ends documents; needed by the next two.
        eod_mask_loss: no loss where the token read is `eod_token`.
        reset_state_at_eod: make `segment_ids`.
        num_workers: threads that read ahead (0 reads when asked). They change nothing but the time.
        reset_attention_at_eod: make `segment_ids` too; which layers look at them is theirs to know.
        start_tokens: tokens consumed before `start_sample`; None: `start_sample * seq_length`.

    Attributes:
        next_sample: global number of the first sample not yet handed out (to all ranks together). Save it, pass it as
            `start_sample` later.

    Raises:
        DataError: a size is not positive, the cursor lies beyond the data, or an EOD token is needed and not given.
    """

    def __init__(
        self,
        dataset: Dataset,
        micro_batch: int,
        data_rank: int,
        data_size: int,
        gradient_accumulation: int = 1,
        start_sample: int = 0,
        eod_token: int | None = None,
        eod_mask_loss: bool = False,
        reset_state_at_eod: bool = False,
        num_workers: int = 0,
        reset_attention_at_eod: bool = False,
        start_tokens: int | None = None,
    ) -> None:
        if min(micro_batch, data_size, gradient_accumulation) < 1 or not 0 <= data_rank < data_size:
            raise DataError(
                f"no batches of {micro_batch} x {gradient_accumulation} for data-parallel rank {data_rank} of {data_size}",
                why="sizes must be at least 1 and the rank inside the group",
            )
        if not 0 <= start_sample <= len(dataset):
            raise DataError(
                f"the data cursor stands at sample {start_sample} and there are {len(dataset)}",
                why="the checkpoint was made with more data, or train_iters was lowered",
            )
        boundaries = reset_state_at_eod or reset_attention_at_eod
        if eod_token is None and (eod_mask_loss or boundaries):
            raise DataError("eod_mask_loss and reset_*_at_eod need an end-of-document token", why="none is known")
        self.dataset = dataset
        self.micro_batch, self.data_rank, self.data_size = micro_batch, data_rank, data_size
        self.gradient_accumulation, self.num_workers = gradient_accumulation, num_workers
        self.eod_token, self.eod_mask_loss, self.with_borders = eod_token, eod_mask_loss, boundaries
        self.next_sample = self._start_sample = start_sample
        self._start_tokens = start_sample * dataset.seq_length if start_tokens is None else start_tokens

    @property
    def samples_per_micro_batch(self) -> int:
        """Samples of one micro batch on all ranks."""
        return self.micro_batch * self.data_size

    @property
    def samples_per_step(self) -> int:
        """The global batch size."""
        return self.samples_per_micro_batch * self.gradient_accumulation

    @property
    def steps_left(self) -> int:
        """Whole steps between the cursor and the end of the data."""
        return (len(self.dataset) - self.next_sample) // self.samples_per_step

    @property
    def consumed_tokens(self) -> int:
        """Tokens handed out since the run began, on all ranks, earlier parts of the run included."""
        return self._start_tokens + (self.next_sample - self._start_sample) * self.dataset.seq_length

    def state(self) -> dict[str, Any]:
        """The cursor, for a checkpoint: pass the values as `start_sample` and `start_tokens`, whatever the batch size is then.

        Data that are read as a stream add `stream`, which their `open_stream_dataset` takes as `saved`.
        """
        state: dict[str, Any] = {"next_sample": self.next_sample, "consumed_tokens": self.consumed_tokens}
        if isinstance(self.dataset, StreamDataset):
            state["stream"] = self.dataset.cursor(self.next_sample)
        return state

    def __iter__(self) -> Iterator[MicroBatch]:
        """Micro-batches from the cursor on; the cursor moves as each is handed out."""
        starts = range(
            self.next_sample,
            self.next_sample + self.steps_left * self.samples_per_step,
            self.samples_per_micro_batch,
        )
        loaded = self._read_ahead(starts) if self.num_workers > 0 else map(self._load, starts)
        for start, batch in zip(starts, loaded, strict=True):
            self.next_sample = start + self.samples_per_micro_batch
            yield batch

    def _read_ahead(self, starts: range) -> Iterator[MicroBatch]:
        """The same micro batches in the same order, up to two per thread in advance; an error surfaces in its turn."""
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="batches")
        waiting: deque[Future[MicroBatch]] = deque()
        try:
            for start in starts:
                waiting.append(pool.submit(self._load, start))
                if len(waiting) > 2 * self.num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _load(self, start: int) -> MicroBatch:
        """This rank's part of the global micro batch whose first sample is `start`."""
        first = start + self.data_rank * self.micro_batch
        ids = list(range(first, first + self.micro_batch))
        samples = [self.dataset.sample(i) for i in ids]
        text = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
        tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        loss_mask = torch.ones(tokens.shape, dtype=torch.float32)
        if any(sample.targets is not None for sample in samples):
            labels = torch.from_numpy(np.stack([_targets(sample) for sample in samples]))[:, 1:].contiguous()
            loss_mask[labels < 0] = 0.0
            labels.clamp_(min=0)
        ends = tokens == self.eod_token if self.eod_token is not None else None
        if ends is not None and self.eod_mask_loss:
            loss_mask[ends] = 0.0
        segments = None
        if ends is not None and self.with_borders:
            segments = (ends.cumsum(dim=1) - ends.long()).to(torch.int32)
        return MicroBatch(tokens, labels, loss_mask, segments, ids)


def _targets(sample: Sample) -> NDArray[np.int64]:
    return sample.tokens if sample.targets is None else sample.targets


def cu_seqlens(segment_ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Document boundaries in the form variable-length kernels want.

    Args:
        segment_ids: [b, s], constant inside a document and different in the next.

    Returns:
        i32 [pieces + 1], where each piece begins in the flattened [b * s] tokens (a row always begins one), from 0 to b * s;
        and the length of the longest piece.
    """
    changes = torch.ones_like(segment_ids, dtype=torch.bool)
    changes[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = changes.flatten().nonzero().flatten()
    boundaries = torch.cat([starts, starts.new_tensor([segment_ids.numel()])]).to(torch.int32)
    return boundaries, int(boundaries.diff().max()) if segment_ids.numel() else 0
