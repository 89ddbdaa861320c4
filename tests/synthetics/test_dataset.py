"""Slices as a dataset: a sample is a function of its number, a batch keeps to a slice, splits are apart, epochs are whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron.data.batches import MicroBatchLoader
from megatron.errors import ConfigError, DataError
from megatron.synthetics.dataset import BLOCK, SyntheticDataset, read_slices
from megatron.synthetics.number_tokenizer import NumberTokenizer

SPEC: dict[str, Any] = {
    "task": "mqar",
    "vocab_size": 64,
    "train": [{"length": 16, "pairs": 2, "examples": 2 * BLOCK + 40}, {"length": 24, "pairs": 4, "examples": 96}],
    "valid": [{"length": 16, "pairs": 2, "examples": 64}, {"length": 32, "pairs": 4, "examples": 32}],
}


def dataset(split: str = "train", seed: int = 3, batch: int = 32, **more: Any) -> SyntheticDataset:
    return SyntheticDataset(read_slices(SPEC, split), seed, split, batch, **more)


def test_a_sample_is_a_function_of_its_number() -> None:
    one, other = dataset(count=5000), dataset(count=5000)
    for index in (4000, 0, 31, 4999, 64):
        a, b = one.sample(index), other.sample(index)
        assert (a.tokens == b.tokens).all() and a.targets is not None and (a.targets == b.targets).all()
        turn, whole = one.batch(index // 32)
        size = whole.inputs.shape[1]
        assert (whole.inputs[index % 32] == a.tokens[:size]).all() and (
            whole.labels[index % 32] == a.targets[1 : size + 1]
        ).all()
        assert size == one.stores[turn].task.seq_length and (a.targets[size + 1 :] == -100).all(), (
            "filled up behind the example"
        )
    assert not (dataset(seed=4).sample(0).tokens == one.sample(0).tokens).all()


def test_an_epoch_reads_every_example_once_and_the_next_in_another_order() -> None:
    data = dataset()
    epochs = []
    for epoch in range(2):
        seen: list[list[int]] = [[], []]
        for turn, batch in data.epoch(epoch):
            seen[turn] += data.ids(epoch, turn, batch).tolist()
        whole = 2 * BLOCK + 40 - (2 * BLOCK + 40) % 32
        assert len(seen[0]) == len(set(seen[0])) == whole and max(seen[0]) < 2 * BLOCK + 40
        assert sorted(seen[1]) == list(range(96))
        epochs.append(seen)
    assert epochs[0] != epochs[1] and data.epoch(0) != data.epoch(1)


def test_splits_share_no_example_and_evaluation_takes_turns() -> None:
    valid, test = dataset("valid"), dataset("test")
    assert [turn for turn, _ in valid.epoch(0)] == [0, 1, 0]
    assert valid.ids(0, 0, 1).tolist() == list(range(32, 64))
    texts = [{bytes(d.sample(i).tokens[:16].tobytes()) for i in range(32)} for d in (valid, test, dataset())]
    assert not (texts[0] & texts[1]) and not (texts[0] & texts[2])


def test_more_examples_do_not_change_the_first() -> None:
    few = dataset("valid").stores[0].rows(np.arange(10))
    spec = {**SPEC, "valid": [{"length": 16, "pairs": 2, "examples": 5000}]}
    many = SyntheticDataset(read_slices(spec, "valid"), 3, "valid", 32).stores[0].rows(np.arange(10))
    assert (few.inputs == many.inputs).all()


def test_batches_mask_what_is_not_asked() -> None:
    """Through the same class as every corpus; two data-parallel ranks share a global batch."""
    ranks = [next(iter(MicroBatchLoader(dataset(), 16, rank, 2))) for rank in (0, 1)]
    _, whole = dataset().batch(0)
    size = whole.inputs.shape[1]
    assert ranks[1].sample_ids == list(range(16, 32)) and ranks[0].tokens.shape == (16, 24)
    labels = np.concatenate([batch.labels.numpy() for batch in ranks])[:, :size]
    counted = np.concatenate([batch.loss_mask.numpy() for batch in ranks])[:, :size] > 0
    assert (counted == (whole.labels >= 0)).all() and (labels[counted] == whole.labels[counted]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "mqr"}, "no synthetic task 'mqr'"),
        ({"train": []}, "no slices for 'train'"),
        ({"train": [{"length": 16, "pairs": 2}]}, "examples None"),
        ({"train": [3]}, "a mapping"),
        ({"power_b": 1}, "no parameter 'power_b'"),
    ],
)
def test_mistakes_in_a_specification(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_slices({**SPEC, **change}, "train")
    assert message in str(caught.value)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(DataError, match="does not fill a batch"):
        dataset(batch=200)
    with pytest.raises(DataError, match="do not fit"):
        dataset(length=20)
    with pytest.raises(DataError, match="are asked for"):
        dataset("valid", count=500)
    with pytest.raises(DataError, match="does not exist"):
        dataset("valid").sample(96)


def test_numbers_as_text() -> None:
    tokenizer = NumberTokenizer(20)
    assert tokenizer.tokenize("3 17 5") == [3, 17, 5] and tokenizer.detokenize([3, 17, 5]) == "3 17 5"
    assert tokenizer.fingerprint() != NumberTokenizer(21).fingerprint()
    for text in ("3 20", "a"):
        with pytest.raises(DataError, match="no token"):
            tokenizer.tokenize(text)
    with pytest.raises(DataError, match="end-of-document"):
        _ = tokenizer.eod
