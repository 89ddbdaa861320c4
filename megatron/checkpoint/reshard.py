"""Which bytes of a checkpoint, saved on any mesh, a rank of any other mesh reads: pure functions of the manifest.

Each stored shard is a flat run of elements in a file. Of replicas (over tensor-parallel ranks, or the two copies of a tied
matrix) one is read: the one written at this rank's own mesh position if there is one, so that on the same mesh a resume
reads what the rank itself wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron.checkpoint.manifest import Manifest, OptimizerShard, WeightEntry
from megatron.checkpoint.regions import CopyRange, FlatRange, fill
from megatron.parallel.shard_spec import Slice

MASTER = "master"


@dataclass(frozen=True)
class Read:
    """Elements `[start, stop)` of the flattened tensor `key` of `file`, and where they are copied (relative to `start`)."""

    file: str
    key: str
    start: int
    stop: int
    copies: tuple[CopyRange, ...]


@dataclass(frozen=True)
class MeshPosition:
    """A rank's pipeline and tensor-parallel coordinates, which decide among replicas."""

    pp: int = 0
    tp: int = 0


def _reads(target: FlatRange, spans: Sequence[FlatRange], locate: Callable[[int], tuple[str, str]]) -> tuple[Read, ...]:
    """Reads that fill `target`, one for every stored shard that contributes; `locate` gives a shard's (file, key)."""
    copies_of: dict[int, list[CopyRange]] = {}
    for copy in fill(target, spans):
        copies_of.setdefault(copy.shard, []).append(copy)
    reads = []
    for shard, copies in copies_of.items():
        start, stop = min(c.source for c in copies), max(c.source_stop for c in copies)
        shifted = tuple(
            CopyRange(c.shard, c.size, c.source - start, c.source_strides, c.target, c.target_strides) for c in copies
        )
        reads.append(Read(*locate(shard), start, stop, shifted))
    return tuple(reads)


def weight_reads(name: str, entry: WeightEntry, target: Slice, position: MeshPosition) -> tuple[Read, ...]:
    """The reads that fill the slice `target` of a weight.

    Raises:
        ValueError: the stored shards overlap, or do not cover `target`.
    """
    preferred_first = sorted(entry.parts, key=lambda shard: shard.tp != position.tp)
    # Replicas cover equal slices: this rank's own is read if there is one, else that of the lowest rank.
    shards = list({entry.slice_of(shard): shard for shard in reversed(preferred_first)}.values())
    spans = [FlatRange.full(entry.slice_of(shard)) for shard in shards]
    return _reads(FlatRange.full(target), spans, lambda i: (shards[i].file, name))


def choose_replicas(shards: Iterable[OptimizerShard], position: MeshPosition) -> list[OptimizerShard]:
    """For every stored slice the shards of one (pp, tp) rank, the nearest to `position`."""
    replicas: dict[tuple[int | None, int, int], list[OptimizerShard]] = {}
    for shard in shards:
        replicas.setdefault((shard.dim, shard.start, shard.stop), []).append(shard)
    chosen = []
    for same in replicas.values():
        nearest = min({s.holder for s in same}, key=lambda h: (h[3] != position.pp, h[4] != position.tp, h[3], h[4]))
        chosen += [s for s in same if s.holder == nearest]
    return chosen


@dataclass(frozen=True)
class OptimizerReads:
    """How to fill one range of one parameter's optimizer state.

    Attributes:
        span: the range.
        master: reads of the fp32 master weight.
        moments: name of a moment -> its reads.
        step: updates taken.
    """

    span: FlatRange
    master: tuple[Read, ...]
    moments: Mapping[str, tuple[Read, ...]]
    step: int


def optimizer_reads(manifest: Manifest, name: str, target: FlatRange, position: MeshPosition) -> OptimizerReads:
    """The reads that fill the range `target` of a parameter's optimizer state.

    Raises:
        ValueError: there is none, or the stored shards overlap or do not cover `target`.
    """
    entry, shards = manifest.weights[name], choose_replicas(manifest.optimizer.get(name, ()), position)
    if not shards:
        raise ValueError("the checkpoint has no optimizer state of it")
    spans = [entry.optimizer_span(shard) for shard in shards]

    def reads_of(kind: str) -> tuple[Read, ...]:
        return _reads(target, spans, lambda i: (shards[i].file, f"{kind}/{name}"))

    moments = {moment: reads_of(moment) for moment in shards[0].moments}
    return OptimizerReads(target, reads_of(MASTER), moments, max(shard.step for shard in shards))
