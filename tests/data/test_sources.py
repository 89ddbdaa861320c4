"""Datasets of a run: NeoX's loaders by weight, by documents, by epochs; and an order that outlives another batch size."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.data.batches import MicroBatchLoader
from megatron.data.blend import weights_by_documents
from megatron.data.datasets import BlendedDataset, ChainedDataset, Dataset, RepeatedDataset
from megatron.data.order import sample_counts
from megatron.data.sources import dataset_from_list, datasets_from_split
from megatron.errors import DataError


def test_weights_by_documents(golden_json: Callable[[str], Any]) -> None:
    rows = golden_json("blend/weights_by_num_docs.json")
    assert len(rows) > 20
    for row in rows:
        alpha = [] if isinstance(row["alpha"], str) else [row["alpha"]]  # one row holds the default
        if "error" in row:
            with pytest.raises(DataError):
                weights_by_documents(row["num_docs"], *alpha)
            continue
        assert weights_by_documents(row["num_docs"], *alpha) == pytest.approx(row["weights"], rel=1e-14, abs=0)
    with pytest.raises(DataError):
        weights_by_documents([3, 0], -1.0)


def _loader(golden: Path, args: dict[str, Any], name: str) -> Dataset:
    counts = {name: 1}
    if args["train_iters"]:
        counts = sample_counts(args["train_iters"], args["eval_interval"], args["eval_iters"], args["train_batch_size"])
    paths = [str(golden / "preprocess" / f"{part}_text_document") for part in args[f"{name}_data_paths"]]
    return dataset_from_list(
        paths, args[f"{name}_data_weights"], name, args["seq_length"], counts[name], args["seed"], args["pack_impl"],
        train_epochs=args["train_epochs"],
        documents_alpha=args["weighted_sampler_alpha"] if args["weight_by_num_documents"] else None,
    )  # fmt: skip


@pytest.mark.parametrize(
    "case_id", ["loader_weights", "loader_by_num_docs_alpha1", "loader_by_num_docs_alpha03", "loader_overflow"]
)
def test_loaders_of_neox(case_id: str, golden: Path, golden_json: Callable[[str], Any]) -> None:
    case = {case["id"]: case for case in golden_json("blend/loader_cases.json")}[case_id]
    folder = golden / "blend" / case_id
    for name in ("train", "valid", "test"):
        dataset = _loader(golden, case["args"], name)
        assert isinstance(dataset, BlendedDataset)
        expected = np.load(folder / f"{name}_dataset_index.npy")
        assert np.array_equal(dataset.dataset_index, expected[: len(dataset)])
        # NeoX's blend goes on beyond what the run reads, and over-runs its parts; the same with `repeat`.
        weights = np.array(dataset.needed) if len(dataset.datasets) > 1 else [1]
        whole = BlendedDataset(dataset.datasets, _weights(case["args"], name, dataset, weights), len(expected), repeat=True)
        assert np.array_equal(whole.dataset_index, expected)
        lost = _rows_lost_by_neox(whole) if case_id == "loader_overflow" else set()
        for first, file in ((0, "samples"), (case[name]["tail_first_index"], "tail_samples")):
            for number, sample in enumerate(np.load(folder / f"{name}_{file}.npy"), start=first):
                assert number in lost or np.array_equal(whole[number], sample), (name, number)


def _rows_lost_by_neox(dataset: BlendedDataset) -> set[int]:
    """Samples made of the last row of a padded order, which NeoX answers with another one."""
    lost = set()
    for index in range(len(dataset)):
        part: Any = dataset.datasets[int(dataset.dataset_index[index])]
        inside = int(dataset.dataset_sample_index[index])
        if inside < len(part) and int(part.order.shuffle_idx[inside]) == len(part) - 1:
            lost.add(index)
    return lost


def _weights(args: dict[str, Any], name: str, dataset: BlendedDataset, fallback: Any) -> Any:
    if not args["weight_by_num_documents"]:
        return args[f"{name}_data_weights"]
    counts = [len(part.indexed) for part in dataset.datasets]  # type: ignore[attr-defined]
    return weights_by_documents(counts, args["weighted_sampler_alpha"])


def test_epochs_of_neox(golden: Path, golden_json: Callable[[str], Any], caplog: pytest.LogCaptureFixture) -> None:
    case = {case["id"]: case for case in golden_json("blend/loader_cases.json")}["loader_train_epochs"]
    with caplog.at_level(logging.WARNING):
        train = _loader(golden, case["args"], "train")
    assert "train_data_paths[0] is seen" in caplog.text
    assert isinstance(train, RepeatedDataset) and train.epochs == 2 and len(train) == 2 * case["train"]["len_dataset"]
    for first, file in ((0, "samples"), (case["train"]["tail_first_index"], "tail_samples")):
        for number, sample in enumerate(np.load(golden / f"blend/loader_train_epochs/train_{file}.npy"), start=first):
            assert np.array_equal(train[number], sample) and np.array_equal(train[number + len(train) // 2], sample)
    valid = _loader(golden, case["args"], "valid")
    assert len(valid) == case["valid"]["len_dataset"]


def test_epochs_of_one_corpus(corpus: str) -> None:
    built = datasets_from_split(corpus, "8,1,1", 16, {"train": 1, "valid": 1}, 3, train_epochs=3)
    train, valid = built["train"], built["valid"]
    assert isinstance(train, RepeatedDataset) and valid is not None
    once = len(train) // 3
    assert np.array_equal(train[2], train[2 + once]) and np.array_equal(train[2], train[2 + 2 * once])
    tokens = sum(range(32)) + 31
    assert once == (tokens - 1) // 16


def test_another_batch_size_in_mid_run_repeats_and_skips_nothing(corpus: str) -> None:
    """20 steps of 8, then 20 of 24: more samples than the first order of several epochs holds."""

    def open_run(batch: int, earlier: list[int], state: dict[str, Any]) -> tuple[Dataset, MicroBatchLoader]:
        wanted = state["next_sample"] + 20 * batch
        dataset = datasets_from_split(corpus, "1", 16, {"train": wanted}, 7, earlier_counts=earlier)["train"]
        assert dataset is not None
        cursor = {"start_sample": state["next_sample"], "start_tokens": state["consumed_tokens"]}
        return dataset, MicroBatchLoader(dataset, batch, 0, 1, **cursor)

    start = {"next_sample": 0, "consumed_tokens": 0}
    first, batches = open_run(8, [], start)
    seen = [batch for _, batch in zip(range(20), batches, strict=False)]
    state = batches.state()
    assert state == {"next_sample": 160, "consumed_tokens": 160 * 16}
    second, batches = open_run(24, [160], state)
    later = [batch for _, batch in zip(range(20), batches, strict=False)]
    assert [i for batch in seen + later for i in batch.sample_ids] == list(range(160 + 480))
    assert batches.state() == {"next_sample": 640, "consumed_tokens": 640 * 16}
    # What the first run promised is what the second reads, beyond the change of the batch size too.
    assert isinstance(second, ChainedDataset) and len(first) < 640
    assert all(np.array_equal(first[i], second[i]) for i in range(len(first)))
    third, _ = open_run(8, [160, 640], {"next_sample": 200, "consumed_tokens": 0})
    assert all(np.array_equal(second[i], third[i]) for i in range(len(first) + 50))


def test_lists_grow_without_a_change_of_what_was_seen(golden: Path) -> None:
    paths = [str(golden / f"preprocess/part{i}_text_document") for i in range(3)]
    short = dataset_from_list(paths, [2, 1, 1], "train", 32, 300, 5)
    long = dataset_from_list(paths, [2, 1, 1], "train", 32, 3000, 5, earlier_counts=[300])
    assert all(np.array_equal(short[i], long[i]) for i in range(300)) and len(long) == 3000  # type: ignore[index]


def test_label_lists(golden: Path) -> None:
    text, label = (str(golden / f"preprocess/masked_{kind}_document") for kind in ("text", "label"))
    for pack_impl in ("packed", "pack_until_overflow", "unpacked"):
        dataset = dataset_from_list([text], None, "train", 48, 30, 8, pack_impl, 600, label_paths=[label])
        assert (dataset.sample(0).targets is not None) and len(dataset) == 30
    with pytest.raises(DataError, match="one label file per path"):
        dataset_from_list([text], None, "train", 48, 30, 8, label_paths=[label, label])

