"""JRT's hidden tokens: where they are, what is trained, and that a sample number alone decides."""

from __future__ import annotations

import pytest
import torch

from megatron.data.masking import Masking, masked_batches
from megatron.data.micro_batch import MicroBatch
from megatron.errors import DataError

MASKING = Masking(prefix_length=64, mask_token=999, rate=0.15, seed=7)


def batch(ids: list[int], s: int = 100) -> MicroBatch:
    text = torch.stack([torch.randint(0, 900, (s + 1,), generator=torch.Generator().manual_seed(i)) for i in ids])
    text[:, 5] = 0
    mask = torch.ones(len(ids), s)
    mask[:, s - 20] = 0
    return MicroBatch(text[:, :-1].contiguous(), text[:, 1:].contiguous(), mask, None, ids)


def test_prefix_is_hidden_in_part_and_the_rest_is_left_alone() -> None:
    before = batch([3, 4])
    kept = before.tokens.clone()
    after = MASKING.apply(before)
    assert torch.equal(before.tokens, kept), "the batch that comes in is not changed"
    hidden = after.tokens == 999
    assert not hidden[:, 64:].any() and torch.equal(after.tokens[~hidden], before.tokens[~hidden])
    assert torch.equal(after.labels[:, :64], before.tokens[:, :64]) and torch.equal(after.labels[:, 64:], before.labels[:, 64:])
    trained = after.loss_mask[:, :64] > 0
    assert torch.equal(trained, hidden[:, :64] & (before.tokens[:, :64] > 0)), "id 0 is skipped, as in the original"
    assert torch.equal(after.loss_mask[:, 64:], before.loss_mask[:, 64:]), "other masks stay"


def test_a_sample_number_decides_alone() -> None:
    together = MASKING.apply(batch([3, 4, 5])).tokens
    for row, number in enumerate((3, 4, 5)):
        assert torch.equal(MASKING.apply(batch([number])).tokens[0], together[row])
    assert not torch.equal(MASKING.hidden(3), MASKING.hidden(4))
    assert not torch.equal(MASKING.hidden(3), Masking(64, 999, 0.15, seed=8).hidden(3))


def test_rate() -> None:
    share = torch.stack([Masking(1024, 0).hidden(i) for i in range(64)]).double().mean()
    assert abs(float(share) - 0.15) < 0.006  # four standard deviations of 65,536 draws


def test_wrapping() -> None:
    batches = [batch([1]), batch([2])]
    assert list(masked_batches(batches, None)) == batches
    assert [b.sample_ids for b in masked_batches(batches, MASKING)] == [[1], [2]]
    with pytest.raises(DataError, match="leave nothing"):
        MASKING.apply(batch([1], s=64))
