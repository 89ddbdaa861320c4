"""The arithmetic of slices: any stored cut fills any wanted cut, exactly once."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron.checkpoint.regions import FlatRange, box_of, fill, overlap, range_boxes, volume
from megatron.parallel.shard_spec import ShardKind, Slice, slice_of

CUTS: tuple[ShardKind, ...] = ("column", "row", "heads", "vocab", "replicated")
SHAPE = (8, 16, 3)


def flat(span: FlatRange) -> Tensor:
    """The global element numbers that a span holds, by plain indexing."""
    whole = torch.arange(math.prod(span.part.shape)).view(span.part.shape)
    return whole[tuple(slice(a, b) for a, b in box_of(span.part))].reshape(-1)[span.start : span.stop]


def filled(want: FlatRange, stored: list[FlatRange]) -> Tensor:
    """What a reader of these pieces gets."""
    result = torch.full((want.stop - want.start,), -1)
    for copy in fill(want, stored):
        source = flat(stored[copy.piece]).clone()
        target = result.as_strided(copy.size, copy.target_strides, copy.target)
        target.copy_(source.as_strided(copy.size, copy.source_strides, copy.source))
    return result


def chopped(data: st.DataObject, part: Slice) -> list[FlatRange]:
    """A slice as ranges that ZeRO might have cut, in any order."""
    length = math.prod(part.local_shape)
    edges = sorted({0, length, *data.draw(st.lists(st.integers(0, length), max_size=4))})
    return [FlatRange(part, a, b) for a, b in itertools.pairwise(edges)]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(CUTS), st.sampled_from(CUTS), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8]), st.data())
def test_any_range_of_any_cut_from_any_ranges_of_any_cut(
    a: ShardKind, b: ShardKind, then: int, now: int, data: st.DataObject
) -> None:
    parts = dict.fromkeys(slice_of(SHAPE, a, rank, then) for rank in range(then))
    stored = data.draw(st.permutations([span for part in parts for span in chopped(data, part)]))
    want = data.draw(st.sampled_from(chopped(data, slice_of(SHAPE, b, data.draw(st.integers(0, now - 1)), now))))
    assert torch.equal(filled(want, stored), flat(want))


def test_whole_slices_of_one_cut_are_one_run() -> None:
    stored = [FlatRange.whole(slice_of((8, 6), "column", rank, 4)) for rank in range(4)]
    copies = fill(FlatRange.whole(slice_of((8, 6), "column", 1, 2)), stored)
    assert [(c.piece, c.size, c.source, c.target) for c in copies] == [(2, (12,), 0, 0), (3, (12,), 0, 12)]
    assert all(c.contiguous for c in copies)
    rows = fill(FlatRange.whole(slice_of((8, 6), "row", 1, 2)), stored)
    assert all(c.size == (2, 3) and c.source == 3 and c.source_stop == 12 and not c.contiguous for c in rows)


def test_holes_and_overlaps_are_refused() -> None:
    part = slice_of((8,), "column", 0, 1)
    with pytest.raises(ValueError, match="cover 6 of 8"):
        fill(FlatRange.whole(part), [FlatRange(part, 0, 3), FlatRange(part, 5, 8)])
    with pytest.raises(ValueError, match="cover 9 of 8"):
        fill(FlatRange.whole(part), [FlatRange(part, 0, 5), FlatRange(part, 4, 8)])


@given(st.lists(st.integers(1, 4), max_size=4), st.data())
def test_ranges_become_few_boxes(shape: list[int], data: st.DataObject) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    start, stop = sorted(data.draw(st.tuples(st.integers(0, whole.numel()), st.integers(0, whole.numel()))))
    boxes = list(range_boxes(tuple(shape), start, stop))
    numbers = [n for box in boxes for n in whole[tuple(slice(a, b) for a, b in box)].reshape(-1).tolist()]
    assert sorted(numbers) == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_boxes_of_scalars() -> None:
    assert volume(()) == 1
    assert overlap((), ()) == ()
    scalar = FlatRange.whole(Slice((), None, 0, 0))
    assert [c.size for c in fill(scalar, [scalar])] == [()]
