"""Arithmetic of slices: which part of which stored piece fills which part of a wanted tensor.

A box is one `(start, stop)` per dimension of the global tensor. Nothing here reads a file, so that it can be tested
over all pairs of meshes; `load.py` does what these functions say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.parallel.plan import Slice

Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Copy:
    """Take `source` (slices within stored piece number `piece`) to `target` (slices within the wanted tensor)."""

    piece: int
    source: tuple[slice, ...]
    target: tuple[slice, ...]


def box_of(part: Slice) -> Box:
    """The box that a rank's slice covers."""
    return tuple((part.start, part.stop) if i == part.dim else (0, n) for i, n in enumerate(part.shape))


def volume(box: Box) -> int:
    """Number of elements of a box."""
    size = 1
    for start, stop in box:
        size *= max(0, stop - start)
    return size


def overlap(a: Box, b: Box) -> Box | None:
    """The common part of two boxes, None when they have none."""
    common = tuple((max(p, r), min(q, s)) for (p, q), (r, s) in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def _within(box: Box, frame: Box) -> tuple[slice, ...]:
    return tuple(slice(start - base, stop - base) for (start, stop), (base, _) in zip(box, frame, strict=True))


def copies(want: Box, pieces: Sequence[Box], preferred: Sequence[int] = ()) -> list[Copy]:
    """How to fill `want` from `pieces`: replicas (equal boxes) are read once, a preferred one if there is.

    Raises:
        ValueError: the pieces leave a hole in `want` or lie on top of each other.
    """
    chosen: dict[Box, int] = {}
    for index in [*preferred, *range(len(pieces))]:
        chosen.setdefault(pieces[index], index)
    result, filled = [], 0
    for box, index in chosen.items():
        common = overlap(want, box)
        if common is not None:
            filled += volume(common)
            result.append(Copy(index, _within(common, box), _within(common, want)))
    if filled != volume(want):
        raise ValueError(f"the stored pieces cover {filled} of {volume(want)} elements")
    return result


def range_copies(start: int, stop: int, pieces: Sequence[tuple[int, int]]) -> list[Copy]:
    """`copies` for flat ranges: fill `[start, stop)` from pieces that are ranges of the same flattened tensor."""
    if start == stop:
        return []
    return copies(((start, stop),), [((a, b),) for a, b in pieces])
