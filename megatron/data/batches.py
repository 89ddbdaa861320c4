"""Maps global sample numbers to the tensors of one rank; the next sample number is the only state of the data loader.

Global micro batch k holds samples `[k * micro * n, (k + 1) * micro * n)` for n data-parallel ranks, and rank r takes its contiguous
slice, as in NeoX. Context-parallel ranks of one data-parallel rank read the same rows; the engine takes their shards. The samples of a step depend on the global batch only, not on the number of ranks, so a run can resume with another
number of ranks, micro batch or batch size without repeating or skipping a sample.
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

__all__ = ["BlendedDataset", "Dataset", "MicroBatchLoader", "PackedDataset"]


class MicroBatchLoader:
    """Iterates over this rank's micro batches, from `next_sample` to the last complete global batch.

    Args:
        dataset: source of the samples.
        micro_batch: samples per rank and micro batch (b).
        data_rank: which of the ranks that read different samples this is (`Mesh.data_rank`).
        data_size: their number.
        gradient_accumulation: micro batches per step; iteration ends with a complete step.
        start_sample: first global sample number, from a checkpoint.
        eod_token: id that ends documents; required by `eod_mask_loss` and `reset_*_at_eod`.
        eod_mask_loss: mask the loss where the input token is `eod_token`.
        reset_state_at_eod: compute `segment_ids`.
        num_workers: threads that prefetch (0: load on demand); they affect speed only.
        reset_attention_at_eod: compute `segment_ids` too; each layer decides whether it uses them.
        start_tokens: tokens consumed before `start_sample`; None: `start_sample * seq_length`.

    Attributes:
        next_sample: global number of the first sample that no rank has received yet. Save it and pass it as
            `start_sample` to resume.

    Raises:
        DataError: a size is not positive, the cursor is beyond the data, or a required EOD token is missing.
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
                f"the data cursor is at sample {start_sample} of {len(dataset)}",
                why="the checkpoint was made with more data, or train_iters was lowered",
            )
        boundaries = reset_state_at_eod or reset_attention_at_eod
        if eod_token is None and (eod_mask_loss or boundaries):
            raise DataError("eod_mask_loss and reset_*_at_eod need an end-of-document token", why="none is known")
        self.dataset = dataset
        self.micro_batch, self.data_rank, self.data_size = micro_batch, data_rank, data_size
        self.gradient_accumulation, self.num_workers = gradient_accumulation, num_workers
        self.eod_token, self.eod_mask_loss, self.with_segments = eod_token, eod_mask_loss, boundaries
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
        """Complete steps between the cursor and the end of the data."""
        return (len(self.dataset) - self.next_sample) // self.samples_per_step

    @property
    def consumed_tokens(self) -> int:
        """Tokens consumed since the beginning of the run, on all ranks, earlier sessions included."""
        return self._start_tokens + (self.next_sample - self._start_sample) * self.dataset.seq_length

    def state(self) -> dict[str, Any]:
        """The data state for a checkpoint: pass the values as `start_sample` and `start_tokens`, with any batch size.

        A streamed dataset adds `stream`, which `open_stream_dataset` takes as `saved`.
        """
        state: dict[str, Any] = {"next_sample": self.next_sample, "consumed_tokens": self.consumed_tokens}
        if isinstance(self.dataset, StreamDataset):
            state["stream"] = self.dataset.cursor(self.next_sample)
        return state

    def __iter__(self) -> Iterator[MicroBatch]:
        """Micro batches from the cursor on; the cursor advances with each."""
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
        """The same micro batches in the same order, up to two per thread ahead; errors surface in order too."""
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
        """This rank's slice of the global micro batch whose first sample is `start`."""
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
        if ends is not None and self.with_segments:
            segments = (ends.cumsum(dim=1) - ends.long()).to(torch.int32)
        return MicroBatch(tokens, labels, loss_mask, segments, ids)


def _targets(sample: Sample) -> NDArray[np.int64]:
    return sample.tokens if sample.targets is None else sample.targets

