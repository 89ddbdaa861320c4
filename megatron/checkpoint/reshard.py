"""What to read of a checkpoint of any mesh for a rank of any other: pure functions of the manifest and the wanted slices.

Each stored piece is a flat run of elements in a file. Of pieces that hold the same numbers (replicas over tensor ranks, the
two copies of a tied matrix) one is taken: that of this rank's own place when there is one, so that a resume on the same
mesh reads what the rank itself wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron.checkpoint.manifest import Manifest, OptimizerPart, WeightEntry
from megatron.checkpoint.regions import CopyRange, FlatRange, fill
from megatron.parallel.shard_spec import Slice

MASTER = "master"


@dataclass(frozen=True)
class Read:
    """Elements `[start, stop)` of the flattened tensor `key` of `file`, and where they go (relative to `start`)."""

    file: str
    key: str
    start: int
    stop: int
    copies: tuple[CopyRange, ...]


@dataclass(frozen=True)
class Place:
    """Where a rank stands, as far as the choice among replicas goes."""

    pp: int = 0
    tp: int = 0


def _reads(want: FlatRange, spans: Sequence[FlatRange], where: Callable[[int], tuple[str, str]]) -> tuple[Read, ...]:
    """Reads that fill `want`, one for every stored piece that is touched."""
    touched: dict[int, list[CopyRange]] = {}
    for copy in fill(want, spans):
        touched.setdefault(copy.piece, []).append(copy)
    result = []
    for piece, copies in touched.items():
        start, stop = min(c.source for c in copies), max(c.source_stop for c in copies)
        moved = tuple(
            CopyRange(c.piece, c.size, c.source - start, c.source_strides, c.target, c.target_strides) for c in copies
        )
        result.append(Read(*where(piece), start, stop, moved))
    return tuple(result)


def weight_reads(name: str, entry: WeightEntry, want: Slice, place: Place) -> tuple[Read, ...]:
    """How to fill the slice `want` of a weight.

    Raises:
        ValueError: the stored parts leave a hole or overlap.
    """
    ending = f"-model_{place.tp:02d}.safetensors"
    parts = sorted(entry.parts, key=lambda part: not part.file.endswith(ending))
    chosen = list({entry.slice_of(part): part for part in reversed(parts)}.values())
    spans = [FlatRange.whole(entry.slice_of(part)) for part in chosen]
    return _reads(FlatRange.whole(want), spans, lambda i: (chosen[i].file, name))


def chosen_parts(parts: Iterable[OptimizerPart], place: Place) -> list[OptimizerPart]:
    """For every stored slice the parts of one holder, the nearest to `place`."""
    holders: dict[tuple[int | None, int, int], list[OptimizerPart]] = {}
    for part in parts:
        holders.setdefault((part.dim, part.start, part.stop), []).append(part)
    chosen = []
    for same in holders.values():
        best = min({p.holder for p in same}, key=lambda h: (h[3] != place.pp, h[4] != place.tp, h[3], h[4]))
        chosen += [p for p in same if p.holder == best]
    return chosen


@dataclass(frozen=True)
class OptimizerReads:
    """How to fill one range of one parameter: reads of the master and of each moment; step: updates taken."""

    span: FlatRange
    master: tuple[Read, ...]
    moments: Mapping[str, tuple[Read, ...]]
    step: int


def optimizer_reads(manifest: Manifest, name: str, want: FlatRange, place: Place) -> OptimizerReads:
    """How to fill `want` of a parameter's optimizer state.

    Raises:
        ValueError: there is none, or the stored parts leave a hole or overlap.
    """
    entry, parts = manifest.weights[name], chosen_parts(manifest.optimizer.get(name, ()), place)
    if not parts:
        raise ValueError("the checkpoint has no optimizer state of it")
    spans = [entry.optimizer_span(part) for part in parts]

    def of(kind: str) -> tuple[Read, ...]:
        return _reads(want, spans, lambda i: (parts[i].file, f"{kind}/{name}"))

    return OptimizerReads(want, of(MASTER), {m: of(m) for m in parts[0].moments}, max(part.step for part in parts))
