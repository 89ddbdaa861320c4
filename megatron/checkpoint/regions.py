"""Arithmetic of resharding: which elements of which stored shard fill which elements of a target tensor.

A stored shard is a `FlatRange`: a range of the flattened slice of a global tensor. Weights (the range is the full slice) and
optimizer states (ZeRO splits flattened slices anywhere) have this form, so one function reshards both. Nothing here reads a
file, so all pairs of meshes can be tested.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from megatron.parallel.shard_spec import Slice

Region = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class FlatRange:
    """`[start, stop)` of the flattened slice `base` of a global tensor."""

    base: Slice
    start: int
    stop: int

    @classmethod
    def full(cls, base: Slice) -> FlatRange:
        """All elements of a slice."""
        return cls(base, 0, prod(base.local_shape))


@dataclass(frozen=True)
class CopyRange:
    """A strided copy from one stored shard to the target; both are flat, and all numbers count elements.

    Attributes:
        shard: index of the stored shard.
        size: loop lengths; empty is a single element, one entry with strides 1 is one contiguous run.
        source: offset of the first element in the shard.
        source_strides: source step of each loop.
        target: offset of the first element in the target.
        target_strides: target step of each loop.
    """

    shard: int
    size: tuple[int, ...]
    source: int
    source_strides: tuple[int, ...]
    target: int
    target_strides: tuple[int, ...]

    @property
    def source_stop(self) -> int:
        """One past the last element that is read."""
        return self.source + 1 + sum((n - 1) * s for n, s in zip(self.size, self.source_strides, strict=True))

    @property
    def contiguous(self) -> bool:
        """Whether the source is one run."""
        return self.source_stop - self.source == prod(self.size)


def region_of(base: Slice) -> Region:
    """The region of the global tensor that a rank's slice covers."""
    return tuple((base.start, base.stop) if i == base.dim else (0, n) for i, n in enumerate(base.shape))


def overlap(a: Region, b: Region) -> Region | None:
    """The intersection of two regions; None when it is empty."""
    common = tuple((max(p, r), min(q, s)) for (p, q), (r, s) in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def range_regions(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Region]:
    """Split a range of a flattened tensor into at most `2 * len(shape) - 1` rectangular regions."""
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    row = prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last:
        yield from (
            ((first, first + 1), *region) for region in range_regions(shape[1:], start - first * row, stop - first * row)
        )
        return
    if start % row:
        yield from (((first, first + 1), *region) for region in range_regions(shape[1:], start % row, row))
        first += 1
    if stop % row:
        yield from (((last, last + 1), *region) for region in range_regions(shape[1:], 0, stop % row))
        last -= 1
    if first <= last:
        yield ((first, last + 1), *((0, n) for n in shape[1:]))


def _global_regions(span: FlatRange) -> list[Region]:
    origin = [start for start, _ in region_of(span.base)]
    local = range_regions(span.base.local_shape, span.start, span.stop)
    return [tuple((a + o, b + o) for (a, b), o in zip(region, origin, strict=True)) for region in local]


def _offset_and_strides(region: Region, span: FlatRange) -> tuple[int, tuple[int, ...]]:
    """Where a region begins in the flat range `span`, and its strides there."""
    shape = span.base.local_shape
    strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    origin = [start for start, _ in region_of(span.base)]
    begin = sum((start - o) * s for (start, _), o, s in zip(region, origin, strides, strict=True))
    return begin - span.start, strides


def _coalesced(copy: CopyRange) -> CopyRange:
    """The same copy with as few loops as possible: adjacent loops that form one run in source and target are merged."""
    loops: list[tuple[int, int, int]] = []
    for n, s, t in zip(copy.size, copy.source_strides, copy.target_strides, strict=True):
        if n == 1:
            continue
        if loops and loops[-1][1] == n * s and loops[-1][2] == n * t:
            loops[-1] = (loops[-1][0] * n, s, t)
        else:
            loops.append((n, s, t))
    size, source, target = zip(*loops, strict=True) if loops else ((), (), ())
    return CopyRange(copy.shard, tuple(size), copy.source, tuple(source), copy.target, tuple(target))


def _copies(target: FlatRange, target_regions: list[Region], stored: FlatRange, shard: int) -> Iterator[CopyRange]:
    # The same slice on both sides: flat positions agree, so the overlap is one run whatever the shape.
    if target.base == stored.base:
        start, stop = max(target.start, stored.start), min(target.stop, stored.stop)
        if start < stop:
            yield _coalesced(CopyRange(shard, (stop - start,), start - stored.start, (1,), start - target.start, (1,)))
        return
    for stored_region in _global_regions(stored):
        for target_region in target_regions:
            common = overlap(target_region, stored_region)
            if common is not None:
                size = tuple(stop - start for start, stop in common)
                yield _coalesced(
                    CopyRange(shard, size, *_offset_and_strides(common, stored), *_offset_and_strides(common, target))
                )


def fill(target: FlatRange, stored: Sequence[FlatRange]) -> list[CopyRange]:
    """The copies that fill `target` from stored shards of the same global tensor.

    Args:
        target: the elements to fill.
        stored: shards that do not overlap; the caller has dropped replicas (`reshard.py`).

    Returns:
        Copies that together write every element of `target` once.

    Raises:
        ValueError: the shards overlap, or do not cover `target`.
    """
    target_regions = _global_regions(target)
    copies = [copy for i, span in enumerate(stored) for copy in _copies(target, target_regions, span, i)]
    filled = sum(prod(copy.size) for copy in copies)
    if filled != target.stop - target.start:
        raise ValueError(f"the stored shards cover {filled} of {target.stop - target.start} elements")
    return copies
