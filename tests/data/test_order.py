"""Splits and sample order: NeoX's arrays, element for element, and what it gets wrong refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.datasets import PackedDataset
from megatron.data.indexed import IndexedDataset
from megatron.data.order import (
    SPLIT_NAMES,
    build_sample_index,
    epochs_for,
    sample_counts,
    split_borders,
    split_documents,
)
from megatron.data.order_cache import cached_sample_index
from megatron.errors import DataError


def test_splits_are_those_of_neox(golden_json: Callable[[str], Any]) -> None:
    rows = golden_json("splits.json")
    assert len(rows) == 525
    for row in rows:
        # NeoX makes negative boundaries of a negative share; here that is an error like its own errors.
        if "error" in row or "-" in row["split"]:
            with pytest.raises(DataError):
                split_borders(row["split"], row["size"])
        else:
            assert split_borders(row["split"], row["size"]) == row["result"], row


@pytest.mark.parametrize("split", ["nan,1", "inf", "1/2,1", "0,0,0,5"])
def test_other_bad_splits(split: str) -> None:
    with pytest.raises(DataError, match="split"):
        split_borders(split, 10)


def _documents(case: dict[str, Any], name: str, count: int) -> range:
    return split_documents(case["split"], count)[name] if case["split"] else range(count)


def _packed_cases(golden_json: Callable[[str], Any]) -> Iterator[tuple[dict[str, Any], str, int]]:
    for case in golden_json("indexmaps/manifest.json"):
        if case["pack_impl"] == "packed":
            for name in case["datasets"]:
                yield case, name, SPLIT_NAMES.index(name) if case["split"] else 0


def test_packed_order_and_samples_are_those_of_neox(golden: Path, golden_json: Callable[[str], Any]) -> None:
    seen = 0
    for case, name, place in _packed_cases(golden_json):
        indexed = IndexedDataset(golden / case["source"])
        documents = _documents(case, name, len(indexed))
        expected = case["datasets"][name]
        if expected is None:
            assert len(documents) == 0
            continue
        arguments = (case["seq_length"], case["num_samples"][place], case["seed"], case["num_epochs"][place])
        order = build_sample_index(documents, indexed.sizes, *arguments)
        folder = golden / "indexmaps" / case["id"]
        for part, file in zip(("doc_idx", "sample_idx", "shuffle_idx"), expected["files"], strict=True):
            array = np.load(folder / file)
            assert getattr(order, part).dtype == array.dtype, (case["id"], name, part)
            assert np.array_equal(getattr(order, part), array), (case["id"], name, part)
        assert order.neox_length == expected["len"]
        dataset = PackedDataset(indexed, order)
        samples = np.load(folder / expected["samples"])
        assert np.array_equal([dataset[i] for i in range(len(samples))], samples), (case["id"], name)
        last = expected["edge_indices"][str(len(order) - 1)]
        assert dataset[len(order) - 1][:8].tolist() == last["tokens_head"][:8]
        assert int(dataset[len(order) - 1].sum()) == last["tokens_sum"]
        seen += 1
    assert seen >= 40


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=30).filter(lambda sizes: sum(sizes) > 0),
    seq_length=st.integers(1, 20),
    num_samples=st.integers(0, 60),
    seed=st.integers(0, 2**32 - 1),
)
def test_windows_tile_the_stream(sizes: list[int], seq_length: int, num_samples: int, seed: int) -> None:
    array = np.array(sizes, dtype=np.int32)
    order = build_sample_index(np.arange(len(sizes)), array, seq_length, num_samples, seed)
    assert len(order) >= num_samples
    assert sorted(order.shuffle_idx.tolist()) == list(range(len(order)))
    starts = np.concatenate([[0], np.cumsum(array[order.doc_idx])])
    place, offset = order.sample_idx[:, 0], order.sample_idx[:, 1]
    assert (starts[place] + offset).tolist() == [i * seq_length for i in range(len(order) + 1)]
    assert (offset[1:] < array[order.doc_idx[place[1:]]]).all()


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=40).filter(lambda sizes: sum(sizes) > 9),
    first=st.integers(0, 20),
    piece=st.integers(1, 7),
    samples=st.integers(1, 70),
)
def test_pieces_and_ranges_change_nothing(sizes: list[int], first: int, piece: int, samples: int) -> None:
    array = np.array([5] * first + sizes, dtype=np.int32)
    documents = range(first, len(array))
    whole = build_sample_index(np.array(documents), array, 3, samples, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron.data.order.CHUNK", piece)
        pieces = build_sample_index(documents, array, 3, samples, 8)
    for part in ("doc_idx", "sample_idx", "shuffle_idx"):
        a, b = getattr(whole, part), getattr(pieces, part)
        assert a.dtype == b.dtype and np.array_equal(a, b)
    assert np.array_equal(pieces.doc_idx, _shuffled(documents, len(pieces.doc_idx) // len(documents)))


def _shuffled(documents: range, epochs: int) -> np.ndarray[Any, Any]:
    """The documents of all epochs as numpy shuffles plain 4-byte ids."""
    plain = np.tile(np.array(documents, dtype=np.int32), epochs)
    np.random.RandomState(8).shuffle(plain)
    return plain


def test_epochs_and_counts() -> None:
    for tokens, seq_length, samples in ((100, 10, 9), (100, 10, 10), (7, 3, 50), (5, 100, 3), (1, 1, 1)):
        looped = next(e for e in range(1, 10**6) if (e * tokens - 1) // seq_length >= samples)
        assert epochs_for(tokens, seq_length, samples) == looped
    assert sample_counts(50, 20, 3, 8) == {"train": 400, "valid": 72, "test": 24}


@pytest.mark.parametrize(
    ("sizes", "arguments", "message"),
    [
        ([0, 0], (4, 1, 0, None), "no tokens"),
        ([3], (4, None, 0, 1), "too few"),
        ([30], (4, 1, -1, None), "seed"),
        ([30], (4, 1, 2**32, None), "seed"),
        ([30], (0, 1, 0, None), "seq_length"),
        ([30], (4, None, 0, None), "neither"),
        ([30], (4, -1, 0, None), "negative"),
    ],
)
def test_impossible_orders(sizes: list[int], arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_sample_index(np.arange(len(sizes)), np.array(sizes, dtype=np.int32), *arguments)


def test_cache_has_the_names_and_bytes_of_neox(golden: Path, golden_json: Callable[[str], Any], tmp_path: Path) -> None:
    for case, name, place in _packed_cases(golden_json):
        if case["id"] not in ("p01", "p09_epochs", "p13_list_train0") or case["datasets"][name] is None:
            continue
        sizes = IndexedDataset(golden / case["source"]).sizes
        documents = _documents(case, name, len(sizes))
        samples, epochs = case["num_samples"][place], case["num_epochs"][place]
        folder = tmp_path / case["id"]
        folder.mkdir(exist_ok=True)
        prefix = folder / "data"
        cached_sample_index(prefix, name, documents, sizes, case["seq_length"], samples, case["seed"], epochs, small=0)
        for file in case["datasets"][name]["files"]:
            assert (folder / file).read_bytes() == (golden / "indexmaps" / case["id"] / file).read_bytes()


class _Counter:
    """Builds as usual and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        return build_sample_index(*arguments)


def test_cache_is_used_only_when_it_is_proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = _Counter()
    monkeypatch.setattr("megatron.data.order_cache.build_sample_index", builds)
    sizes, documents = np.full(50, 20, dtype=np.int32), np.arange(40)

    def load(documents: Any = documents, sizes: Any = sizes) -> Any:
        return cached_sample_index(tmp_path / "c", "train", documents, sizes, 8, 90, 3, small=0)

    first = load()
    again = load()
    assert builds.calls == 1 and isinstance(again.shuffle_idx, np.memmap)
    assert np.array_equal(first.sample_idx, again.sample_idx)
    assert len(load(np.arange(30, 50))) == len(load(np.arange(30, 50))) and builds.calls == 2  # another split
    load(), load()
    assert builds.calls == 3
    other = sizes.copy()
    other[3] += 1
    load(sizes=other), load()
    assert builds.calls == 5
    stem = tmp_path / "c_train_indexmap_90ns_8sl_3s_packedpi_ac"
    array = Path(f"{stem}_shuffle_idx.npy")
    for damaged in (array.read_bytes()[:-4], b"", array.read_bytes()[:-1] + b"\xff"):
        array.write_bytes(damaged)
        assert np.array_equal(load().shuffle_idx, first.shuffle_idx)
    assert builds.calls == 8
    Path(f"{stem}.json").write_text("[]")
    load()
    array.unlink()
    load()
    assert builds.calls == 10


def test_cache_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    sizes = np.full(50, 20, dtype=np.int32)
    order = cached_sample_index(tmp_path / "absent" / "c", "train", np.arange(50), sizes, 8, 90, 3, small=0)
    assert len(order) >= 90


def test_small_orders_leave_no_file(tmp_path: Path) -> None:
    cached_sample_index(tmp_path / "c", "train", np.arange(50), np.full(50, 20, dtype=np.int32), 8, 90, 3)
    assert list(tmp_path.iterdir()) == []
