"""The arithmetic of slices: any stored cut fills any wanted cut, exactly once."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron.checkpoint.boxes import box_of, copies, overlap, range_copies, volume
from megatron.parallel.plan import Cut, Slice, slice_of

CUTS: tuple[Cut, ...] = ("column", "row", "heads", "vocab", "replicated")


def fill(want: Slice, stored: list[Slice], whole: Tensor, preferred: tuple[int, ...] = ()) -> Tensor:
    """What a reader of these pieces gets."""
    result = torch.full(want.local_shape, -1)
    for step in copies(box_of(want), [box_of(s) for s in stored], preferred):
        piece = whole[tuple(slice(a, b) for a, b in box_of(stored[step.piece]))]
        result[step.target] = piece[step.source]
    return result


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(CUTS), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8]), st.data())
def test_any_cut_from_any_cut(cut: Cut, then: int, now: int, data: st.DataObject) -> None:
    shape = (8, 16, 3)
    whole = torch.arange(8 * 16 * 3).reshape(shape)
    stored = [slice_of(shape, cut, rank, then) for rank in range(then)]
    stored = data.draw(st.permutations(stored))
    rank = data.draw(st.integers(0, now - 1))
    want = slice_of(shape, cut, rank, now)
    expected = whole[tuple(slice(a, b) for a, b in box_of(want))]
    assert torch.equal(fill(want, stored, whole), expected)


def test_another_dimension_is_filled_as_well() -> None:
    whole = torch.arange(64).reshape(8, 8)
    stored = [slice_of((8, 8), "row", rank, 4) for rank in range(4)]
    want = slice_of((8, 8), "column", 1, 2)
    assert torch.equal(fill(want, stored, whole), whole[4:])


def test_replicas_are_read_once_and_the_preferred_one() -> None:
    stored = [slice_of((4,), "replicated", rank, 2) for rank in range(2)]
    assert [c.piece for c in copies(box_of(stored[0]), [box_of(s) for s in stored])] == [0]
    assert [c.piece for c in copies(box_of(stored[0]), [box_of(s) for s in stored], (1,))] == [1]


def test_holes_and_overlaps_are_refused() -> None:
    with pytest.raises(ValueError, match="cover 6 of 8"):
        range_copies(0, 8, [(0, 3), (5, 8)])
    with pytest.raises(ValueError, match="cover 9 of 8"):
        range_copies(0, 8, [(0, 5), (4, 8)])


@given(st.lists(st.integers(0, 50), min_size=2, max_size=6), st.integers(0, 50), st.integers(0, 50))
def test_ranges(cuts: list[int], a: int, b: int) -> None:
    edges = sorted({0, 50, *cuts})
    pieces = list(itertools.pairwise(edges))
    start, stop = min(a, b), max(a, b)
    found = [-1] * (stop - start)
    for step in range_copies(start, stop, pieces):
        piece = list(range(*pieces[step.piece]))
        found[step.target[0]] = piece[step.source[0]]
    assert found == list(range(start, stop))


def test_boxes_of_scalars() -> None:
    assert volume(()) == 1
    assert overlap((), ()) == ()
    assert len(copies((), [()])) == 1
