"""Datasets and batches of a run, and their state in a checkpoint.

Besides the cursor, a checkpoint records the number of training samples planned at each start of the run (so that another batch
size continues the same order), the identity of corpora and tokenizer, and the position in a stream of text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from megatron.config.frozen import thaw
from megatron.config.schema import RunConfig
from megatron.data.batches import MicroBatchLoader
from megatron.data.datasets import Dataset
from megatron.data.fingerprint import check_fingerprint, check_identity, data_identity
from megatron.data.indexed import IndexedDataset
from megatron.data.masking import masked_batches
from megatron.data.micro_batch import MicroBatch
from megatron.data.order import SPLIT_NAMES, sample_counts
from megatron.data.sources import dataset_from_list, datasets_from_split
from megatron.data.streaming import open_stream_dataset
from megatron.data.tokenizers import Tokenizer
from megatron.errors import ConfigError, DataError
from megatron.parallel.mesh import Mesh
from megatron.settings import masking
from megatron.synthetics.dataset import SPLITS, SyntheticDataset, read_slices
from megatron.synthetics.stored import StoredTask


class DataPipeline:
    """Datasets and batches of one run.

    Args:
        run: configuration.
        tokenizer: the tokenizer of the data.
        rows: rows of the embedding; a batch with a larger token id is an error.
    """

    def __init__(self, run: RunConfig, tokenizer: Tokenizer, rows: int) -> None:
        self.run, self.tokenizer, self.rows = run, tokenizer, rows
        self.sets: dict[str, Dataset | None] = {}
        self._counts: list[int] = []
        self._identity: dict[str, Any] = {}
        self._training: MicroBatchLoader | None = None

    def check(self) -> None:
        """Open every corpus and compare its tokenizer, before anything large is built.

        Raises:
            DataError: a corpus is missing, damaged or tokenized by another tokenizer, or none is named.
        """
        if self.run.data.synthetic is not None:
            self._check_synthetic(self.run.data.synthetic)
            return
        prefixes = self._prefixes()
        if not prefixes and not self.run.data.train_stream:
            raise DataError(
                "no training data is named",
                hint="set data_path, or make some: python prepare_data.py pystdlib prints the lines to use",
            )
        for prefix in prefixes:
            IndexedDataset(prefix)
            check_fingerprint(prefix, self.tokenizer)
        self._identity = data_identity(prefixes, self.tokenizer)

    def _check_synthetic(self, spec: Mapping[str, Any]) -> None:
        """Refuse other data besides a synthetic task, draw its slices, and record its description for resumed runs."""
        others = [key for key in ("data_path", "train_data_paths", "train_stream") if getattr(self.run.data, key)]
        if others:
            raise ConfigError(f"synthetic and {others[0]} are both given", where=self.run.provenance.get("synthetic"))
        parts = [part for split in SPLITS for part in read_slices(spec, split, self.tokenizer)]
        contents = "".join(part.task.fingerprint() for part in parts if isinstance(part.task, StoredTask))
        digest = hashlib.sha256((json.dumps(thaw(spec), sort_keys=True) + contents).encode()).hexdigest()
        tokens = sum(part.examples * part.task.seq_length for part in parts)
        corpus = {"sequences": sum(part.examples for part in parts), "tokens": tokens, "sizes_sha256": digest}
        self._identity = {**data_identity([], self.tokenizer), "corpora": [corpus]}

    def _synthetic(self, spec: Mapping[str, Any], name: str, count: int) -> SyntheticDataset:
        """One split of a synthetic task; training repeats its slices, each evaluation reads the same samples."""
        t, batch = self.run.training, self.run.batch.train_batch_size
        parts = read_slices(spec, name, self.tokenizer)
        if name == "train" and t.train_epochs:
            count = t.train_epochs * batch * sum(part.examples // batch for part in parts)
        elif name != "train":
            count = t.eval_iters * batch
        return SyntheticDataset(parts, t.seed, name, batch, self.run.model.seq_length, count)

    def _prefixes(self) -> list[str]:
        data = self.run.data
        if data.data_path is not None:
            return [data.data_path]
        return [path for name in SPLIT_NAMES for path in getattr(data, f"{name}_data_paths") or ()]

    def build(self, saved: Mapping[str, Any]) -> RunConfig:
        """Build the datasets.

        Args:
            saved: `state` of the checkpoint, empty for a new run.

        Returns:
            The configuration; with `train_epochs` its `train_iters` follow from the data.

        Raises:
            DataError: the data are not those of the checkpoint, or a split cannot be built.
        """
        if saved.get("identity"):
            check_identity(saved["identity"], self._identity)
        t = self.run.training
        earlier = [] if t.train_epochs else [int(n) for n in saved.get("counts", ())]
        counts = sample_counts(t.train_iters, t.eval_interval, t.eval_iters, self.run.batch.train_batch_size)
        if t.train_epochs:
            counts["train"] = 1  # any number but 0 asks for the split
        planned = [] if t.train_epochs or earlier[-1:] == [counts["train"]] else [counts["train"]]
        self._counts = earlier + planned
        self.sets = self._datasets(counts, earlier, saved)
        if t.train_epochs:
            train = self.sets["train"]
            assert train is not None  # an empty train split is refused when the corpus is split
            iters = len(train) // self.run.batch.train_batch_size
            self.run = self.run.model_copy(update={"training": t.model_copy(update={"train_iters": iters})})
        return self.run

    def _datasets(self, counts: dict[str, int], earlier: list[int], saved: Mapping[str, Any]) -> dict[str, Dataset | None]:
        data, length, seed = self.run.data, self.run.model.seq_length, self.run.training.seed
        if data.synthetic is not None:
            return {name: self._synthetic(data.synthetic, name, counts[name]) for name in SPLIT_NAMES if counts[name]}
        if data.data_path is not None:
            return datasets_from_split(
                data.data_path,
                data.split,
                length,
                counts,
                seed,
                data.pack_impl,
                self.rows,
                allow_chopped=data.allow_chopped,
                train_epochs=self.run.training.train_epochs,
                earlier_counts=earlier,
            )
        return {name: self._one(name, counts[name], earlier, saved) for name in SPLIT_NAMES}

    def _one(self, name: str, count: int, earlier: list[int], saved: Mapping[str, Any]) -> Dataset | None:
        """One split from a stream or a list of corpora; None if it is not named or not needed."""
        data, length = self.run.data, self.run.model.seq_length
        stream, paths = getattr(data, f"{name}_stream"), getattr(data, f"{name}_data_paths")
        if count == 0:
            return None
        if stream:
            place = saved.get("stream") if name == "train" else None
            return open_stream_dataset(
                stream, self.tokenizer, length, count, place, data.stream_key, self.rows, data.stream_repeat
            )
        if not paths:
            return None
        return dataset_from_list(
            paths,
            getattr(data, f"{name}_data_weights"),
            name,
            length,
            count,
            self.run.training.seed,
            data.pack_impl,
            self.rows,
            allow_chopped=data.allow_chopped,
            train_epochs=self.run.training.train_epochs,
            earlier_counts=earlier if name == "train" else (),
            label_paths=getattr(data, f"{name}_label_data_paths"),
            documents_alpha=data.weighted_sampler_alpha if data.weight_by_num_documents else None,
        )

    def _open(self, dataset: Dataset, mesh: Mesh, start: int, tokens: int | None) -> MicroBatchLoader:
        t = self.run.training
        needs_eod = t.eod_mask_loss or t.reset_state_at_eod or t.reset_attention_at_eod
        return MicroBatchLoader(
            dataset,
            self.run.batch.train_micro_batch_size_per_gpu,
            mesh.data_rank,
            mesh.data_size,
            self.run.batch.gradient_accumulation_steps,
            start_sample=start,
            eod_token=self.tokenizer.eod if needs_eod else None,
            eod_mask_loss=t.eod_mask_loss,
            reset_state_at_eod=t.reset_state_at_eod,
            num_workers=self.run.data.num_workers,
            reset_attention_at_eod=t.reset_attention_at_eod,
            start_tokens=tokens,
        )

    def training(self, mesh: Mesh, start: int, tokens: int) -> Iterator[MicroBatch]:
        """This rank's micro batches of the training.

        Args:
            mesh: position of the rank.
            start: first global sample.
            tokens: tokens consumed before it.
        """
        dataset = self.sets["train"]
        assert dataset is not None  # an empty train split is refused when the corpus is split
        self._training = self._open(dataset, mesh, start, tokens)
        return masked_batches(self._training, masking(self.run, self.rows))

    def evaluation(self, name: str, mesh: Mesh) -> Iterator[MicroBatch]:
        """All micro batches of this rank in the split `name`, `valid` or `test`."""
        dataset = self.sets[name]
        assert dataset is not None  # the caller checks it first
        return masked_batches(self._open(dataset, mesh, 0, None), masking(self.run, self.rows))

    def state(self) -> dict[str, Any]:
        """State for a checkpoint; `build` of the next start reads it."""
        place = self._training.state() if self._training is not None else {}
        stream = {"stream": place["stream"]} if "stream" in place else {}
        return {"counts": self._counts, "identity": self._identity, **stream}
