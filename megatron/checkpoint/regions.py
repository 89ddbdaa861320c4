"""Arithmetic of slices: which part of which stored piece fills which part of a wanted tensor.

A piece is a `FlatRange`: a range of the flattened slice of a global tensor. That is how both weights (the range is the whole
slice) and optimizer states (ZeRO cuts flattened slices anywhere) are stored, so one function re-cuts both. Nothing here
reads a file, so that it can be tested over all pairs of meshes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from megatron.parallel.shard_spec import Slice

Region = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class FlatRange:
    """`[start, stop)` of the flattened slice `part` of a global tensor."""

    part: Slice
    start: int
    stop: int

    @classmethod
    def whole(cls, part: Slice) -> FlatRange:
        """All of a slice."""
        return cls(part, 0, prod(part.local_shape))


@dataclass(frozen=True)
class CopyRange:
    """Take elements of stored piece number `piece` to the wanted one; both are flat, all numbers count elements.

    size: lengths of the loops. source, target: where the first element lies. source_strides, target_strides: steps of
    each loop. An empty `size` is one element; a `size` of one entry with strides 1 is one contiguous run.
    """

    piece: int
    size: tuple[int, ...]
    source: int
    source_strides: tuple[int, ...]
    target: int
    target_strides: tuple[int, ...]

    @property
    def source_stop(self) -> int:
        """One beyond the last element that is read."""
        return self.source + 1 + sum((n - 1) * s for n, s in zip(self.size, self.source_strides, strict=True))

    @property
    def contiguous(self) -> bool:
        """Whether the source is one run."""
        return self.source_stop - self.source == prod(self.size)


def box_of(part: Slice) -> Region:
    """The box that a rank's slice covers."""
    return tuple((part.start, part.stop) if i == part.dim else (0, n) for i, n in enumerate(part.shape))


def volume(box: Region) -> int:
    """Number of elements of a box."""
    return prod(max(0, stop - start) for start, stop in box)


def overlap(a: Region, b: Region) -> Region | None:
    """The common part of two boxes, None when they have none."""
    common = tuple((max(p, r), min(q, s)) for (p, q), (r, s) in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def range_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Region]:
    """A range of a flattened tensor as boxes, at most `2 * len(shape) - 1` of them."""
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    row = prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last:
        yield from (((first, first + 1), *box) for box in range_boxes(shape[1:], start - first * row, stop - first * row))
        return
    if start % row:
        yield from (((first, first + 1), *box) for box in range_boxes(shape[1:], start % row, row))
        first += 1
    if stop % row:
        yield from (((last, last + 1), *box) for box in range_boxes(shape[1:], 0, stop % row))
        last -= 1
    if first <= last:
        yield ((first, last + 1), *((0, n) for n in shape[1:]))


def _global_boxes(span: FlatRange) -> list[Region]:
    base = [start for start, _ in box_of(span.part)]
    found = range_boxes(span.part.local_shape, span.start, span.stop)
    return [tuple((a + o, b + o) for (a, b), o in zip(box, base, strict=True)) for box in found]


def _place(box: Region, span: FlatRange) -> tuple[int, tuple[int, ...]]:
    """Where a box begins in the flat piece of `span`, and the strides in it."""
    shape, strides = span.part.local_shape, []
    for i in range(len(shape)):
        strides.append(prod(shape[i + 1 :]))
    base = [start for start, _ in box_of(span.part)]
    begin = sum((start - o) * s for (start, _), o, s in zip(box, base, strides, strict=True))
    return begin - span.start, tuple(strides)


def _joined(copy: CopyRange) -> CopyRange:
    """The same copy with as few loops as possible: neighbours that form one run in source and target are merged."""
    loops: list[tuple[int, int, int]] = []
    for n, s, t in zip(copy.size, copy.source_strides, copy.target_strides, strict=True):
        if n == 1:
            continue
        if loops and loops[-1][1] == n * s and loops[-1][2] == n * t:
            loops[-1] = (loops[-1][0] * n, s, t)
        else:
            loops.append((n, s, t))
    size, source, target = zip(*loops, strict=True) if loops else ((), (), ())
    return CopyRange(copy.piece, tuple(size), copy.source, tuple(source), copy.target, tuple(target))


def _copies(want: FlatRange, wanted: list[Region], stored: FlatRange, piece: int) -> Iterator[CopyRange]:
    if want.part == stored.part:  # flat in both: one run, whatever the shape
        start, stop = max(want.start, stored.start), min(want.stop, stored.stop)
        if start < stop:
            yield _joined(CopyRange(piece, (stop - start,), start - stored.start, (1,), start - want.start, (1,)))
        return
    for have in _global_boxes(stored):
        for need in wanted:
            common = overlap(need, have)
            if common is not None:
                source, source_strides = _place(common, stored)
                target, target_strides = _place(common, want)
                size = tuple(stop - start for start, stop in common)
                yield _joined(CopyRange(piece, size, source, source_strides, target, target_strides))


def fill(want: FlatRange, stored: Sequence[FlatRange]) -> list[CopyRange]:
    """How to fill `want` from stored pieces of the same global tensor.

    Args:
        want: of the tensor's global shape, like all of `stored`.
        stored: pieces that do not overlap; replicas must have been left out (see `reshard.py`).

    Raises:
        ValueError: the pieces leave a hole in `want` or lie on top of each other.
    """
    wanted = _global_boxes(want)
    result = [copy for i, span in enumerate(stored) for copy in _copies(want, wanted, span, i)]
    filled = sum(prod(copy.size) for copy in result)
    if filled != want.stop - want.start:
        raise ValueError(f"the stored pieces cover {filled} of {want.stop - want.start} elements")
    return result
