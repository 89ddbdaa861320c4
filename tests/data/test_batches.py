"""Samples, blends and batches: the same global batches for every world, resume, and document boundaries."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.data.batches import BlendedDataset, Dataset, MicroBatchLoader, PackedDataset
from megatron.data.datasets import Sample, TokenDataset
from megatron.data.indexed import IndexedDataset
from megatron.data.micro_batch import MicroBatch
from megatron.data.order import build_sample_index, sample_counts
from megatron.data.sources import dataset_from_list, datasets_from_split
from megatron.errors import DataError


@pytest.fixture
def packed(corpus: str) -> PackedDataset:
    indexed = IndexedDataset(corpus)
    return PackedDataset(indexed, build_sample_index(np.arange(40), indexed.sizes, 16, 800, 5))


def _batches(dataset: Dataset, micro: int, world: int, accumulation: int, **options: Any) -> list[MicroBatchLoader]:
    return [MicroBatchLoader(dataset, micro, rank, world, accumulation, **options) for rank in range(world)]


def _global_steps(readers: list[MicroBatchLoader], steps: int) -> list[list[tuple[int, list[int]]]]:
    """Per step the (sample id, tokens) of all ranks and micro batches, sorted by id."""
    iterators = [iter(reader) for reader in readers]
    result = []
    for _ in range(steps):
        seen: list[tuple[int, list[int]]] = []
        for iterator in iterators:
            for _ in range(readers[0].gradient_accumulation):
                batch = next(iterator)
                seen += zip(batch.sample_ids, batch.tokens.tolist(), strict=True)
        result.append(sorted(seen))
    return result


def test_every_world_sees_the_same_global_batches(packed: PackedDataset) -> None:
    expected = None
    for world in (1, 2, 4):
        for micro in (1, 2, 4):
            accumulation = 16 // (world * micro)
            steps = _global_steps(_batches(packed, micro, world, accumulation), 50)
            assert [[i for i, _ in step] for step in steps] == [list(range(16 * k, 16 * k + 16)) for k in range(50)]
            expected = expected or steps
            assert steps == expected
            for start in (1, 25, 49):
                later = _batches(packed, micro, world, accumulation, start_sample=16 * start)
                assert _global_steps(later, 50 - start) == expected[start:]


def test_resume_in_the_middle_on_another_world_and_batch(packed: PackedDataset) -> None:
    first = _batches(packed, 2, 2, 2)
    _global_steps(first, 7)
    cursors = {reader.next_sample for reader in first}
    assert cursors == {56}
    later = _batches(packed, 3, 1, 4, start_sample=56)
    steps = _global_steps(later, 3)
    assert [i for step in steps for i, _ in step] == list(range(56, 56 + 36))
    assert later[0].next_sample == 92


def test_neox_sampler(golden_json: Callable[[str], Any]) -> None:
    class Counting(TokenDataset):
        seq_length = 1

        def __init__(self, length: int) -> None:
            self.length = length

        def __len__(self) -> int:
            return self.length

        def sample(self, index: int) -> Sample:
            return Sample(np.array([index, index]))

    cases = golden_json("blend/distributed_batch_sampler.json")
    fitting = [case for case in cases if case["global_micro_batch"] % case["world_size"] == 0]
    assert len(fitting) > 5
    for case in fitting:
        micro = case["global_micro_batch"] // case["world_size"]
        start = case["start_iter"] * case["global_micro_batch"]
        reader = MicroBatchLoader(Counting(case["dataset_len"]), micro, case["rank"], case["world_size"], start_sample=start)
        assert [batch.sample_ids for batch in reader] == case["batches"], case


def test_tensors(packed: PackedDataset) -> None:
    batch = next(iter(MicroBatchLoader(packed, 3, 0, 1)))
    assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == (3, 16)
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64 and batch.loss_mask.dtype == torch.float32
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    assert batch.segment_ids is None and bool((batch.loss_mask == 1).all())
    assert batch.labels[2].tolist() == packed[2][1:].tolist()


def test_document_boundaries(packed: PackedDataset) -> None:
    options = {"eod_token": 0, "eod_mask_loss": True, "reset_state_at_eod": True}
    ends = 0
    for batch in list(MicroBatchLoader(packed, 4, 0, 1, **options))[:20]:  # type: ignore[arg-type]
        assert batch.segment_ids is not None and batch.segment_ids.dtype == torch.int32
        for tokens, mask, segments in zip(batch.tokens, batch.loss_mask, batch.segment_ids, strict=True):
            segment = 0
            for token, counted, found in zip(tokens.tolist(), mask.tolist(), segments.tolist(), strict=True):
                assert found == segment and counted == (token != 0)
                segment += token == 0
            ends += segment
    assert ends > 50


def _equal(a: MicroBatch, b: MicroBatch) -> bool:
    return a.sample_ids == b.sample_ids and torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels)


def test_reading_ahead_changes_nothing(packed: PackedDataset) -> None:
    plain, ahead = (MicroBatchLoader(packed, 3, 1, 2, 2, start_sample=12, num_workers=n) for n in (0, 3))
    for a, b in zip(plain, ahead, strict=True):
        assert _equal(a, b) and plain.next_sample == ahead.next_sample
    assert plain.next_sample == ahead.next_sample > 12


def test_reading_ahead_can_stop_early_and_raises_in_its_turn(packed: PackedDataset) -> None:
    reader = MicroBatchLoader(packed, 2, 0, 1, num_workers=2)
    iterator = iter(reader)
    next(iterator)
    del iterator
    assert reader.next_sample == 2

    class Failing(PackedDataset):
        def sample(self, index: int) -> Sample:
            if index == 9:
                raise DataError("sample 9 is damaged")
            return super().sample(index)

    seen: list[int] = []
    failing = MicroBatchLoader(Failing(packed.indexed, packed.order), 2, 0, 1, num_workers=2)
    with pytest.raises(DataError, match="sample 9"):
        seen.extend(i for batch in failing for i in batch.sample_ids)
    assert seen == list(range(8))


def test_only_whole_steps(packed: PackedDataset) -> None:
    reader = MicroBatchLoader(packed, 4, 0, 2, 5, start_sample=3)
    total = len(packed)
    assert reader.steps_left == (total - 3) // 40
    assert len(list(reader)) == reader.gradient_accumulation * ((total - 3) // 40)
    assert reader.steps_left == 0 and list(reader) == []


@pytest.mark.parametrize(
    "arguments", [(0, 0, 1), (1, 1, 1), (1, -1, 2), (1, 0, 0), (1, 0, 1, 0), (1, 0, 1, 1, -1), (1, 0, 1, 1, 10**6)]
)
def test_impossible_batches(arguments: tuple[int, ...], packed: PackedDataset) -> None:
    with pytest.raises(DataError):
        MicroBatchLoader(packed, *arguments)  # type: ignore[arg-type]


def test_boundaries_need_an_eod(packed: PackedDataset) -> None:
    with pytest.raises(DataError, match="end-of-document"):
        MicroBatchLoader(packed, 1, 0, 1, reset_state_at_eod=True)


def test_no_sample_beyond_the_end(packed: PackedDataset) -> None:
    packed[len(packed) - 1]
    for index in (len(packed), -1):
        with pytest.raises(DataError, match="does not exist"):
            packed[index]


def test_token_beyond_the_vocabulary_is_named(corpus: str) -> None:
    indexed = IndexedDataset(corpus)
    with open(indexed.bin_path, "r+b") as handle:
        handle.seek(int(indexed.offsets[33]) + 2 * 30)
        handle.write(struct.pack("<H", 777))
    dataset = datasets_from_split(corpus, "1", 16, {"train": 50}, 1, vocab_size=100)["train"]
    assert dataset is not None
    with pytest.raises(DataError, match="777") as error:
        [dataset.sample(index) for index in range(len(dataset))]
    assert "sequence 33, token 30" in str(error.value.where)


def test_blend_checks_its_parts(packed: PackedDataset) -> None:
    with pytest.raises(DataError, match="needs"):
        BlendedDataset([packed, packed], [1, 9], len(packed) * 2)
    with pytest.raises(DataError, match="weight"):
        BlendedDataset([packed], [1, 2], 5)
    other = PackedDataset(packed.indexed, build_sample_index(np.arange(40), packed.indexed.sizes, 8, 9, 5))
    with pytest.raises(DataError, match="seq_length"):
        BlendedDataset([packed, other], [1, 2], 5)
    blended = BlendedDataset([packed, packed], [1, 1], 50)
    assert len(blended) == 50 and blended[3].tolist() == packed[1].tolist()
    with pytest.raises(DataError):
        blended[50]


def test_neox_loaders_by_weights_and_by_split(golden: Path, golden_json: Callable[[str], Any]) -> None:
    cases = {case["id"]: case for case in golden_json("blend/loader_cases.json")}
    folder = golden / "preprocess"
    for case_id in ("loader_weights", "loader_data_path"):
        args = cases[case_id]["args"]
        counts = sample_counts(args["train_iters"], args["eval_interval"], args["eval_iters"], args["train_batch_size"])
        built: dict[str, Dataset | None] = {}
        if args["data_path"] is not None:
            path = str(folder / f"{args['data_path']}_text_document")
            built = datasets_from_split(path, args["split"], args["seq_length"], counts, args["seed"])
        else:
            for name in counts:
                paths = [str(folder / f"{part}_text_document") for part in args[f"{name}_data_paths"]]
                weights = args[f"{name}_data_weights"]
                built[name] = dataset_from_list(paths, weights, name, args["seq_length"], counts[name], args["seed"])
        for name, dataset in built.items():
            expected = np.load(golden / "blend" / case_id / cases[case_id][name]["samples"])[: counts[name]]
            assert dataset is not None and len(expected) >= 24
            assert np.array_equal([dataset[i] for i in range(len(expected))], expected), (case_id, name)


def test_split_without_documents(corpus: str, caplog: pytest.LogCaptureFixture) -> None:
    built = datasets_from_split(corpus, "1,0,0", 16, {"train": 5, "valid": 3, "test": 0}, 1)
    assert built["train"] is not None and built["valid"] is None and built["test"] is None
    assert "the valid split holds no document" in caplog.text and "the test split" not in caplog.text
    with pytest.raises(DataError, match="train split"):
        datasets_from_split(corpus, "0,1,0", 16, {"train": 5}, 1)
    with pytest.raises(DataError, match="weights"):
        dataset_from_list([corpus], [1.0, 2.0], "train", 16, 5, 1)
