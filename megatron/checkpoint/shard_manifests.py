"""Shard manifests: each rank leaves a small JSON of what it wrote in the temporary folder, and rank 0 merges them.

Merging checks that the shards cover every tensor exactly once. So a checkpoint that could not be read back is refused while
the previous one still exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron.checkpoint.block_hashes import FileEntry, file_entry
from megatron.checkpoint.layout import shard_manifest_file
from megatron.checkpoint.manifest import OptimizerShard, WeightEntry, weight_entry
from megatron.checkpoint.shard_contents import ShardContents
from megatron.checkpoint.validate import check_tiles
from megatron.errors import CheckpointError
from megatron.files import read_json, write_json


@dataclass(frozen=True)
class MergedManifest:
    """What all ranks wrote together."""

    files: dict[str, FileEntry]
    weights: dict[str, WeightEntry]
    optimizer: dict[str, tuple[OptimizerShard, ...]]


def write_shard_manifest(folder: Path, rank: int, contents: ShardContents, files: Mapping[str, FileEntry]) -> None:
    """Leave this rank's manifest in the temporary folder."""
    body = {
        "files": {name: asdict(entry) for name, entry in files.items()},
        "weights": {name: asdict(entry) for name, entry in contents.weights.items()},
        "optimizer": {name: asdict(shard) for name, shard in contents.optimizer.items()},
    }
    write_json(folder / shard_manifest_file(rank), body)


def _read(folder: Path, rank: int) -> dict[str, Any]:
    path = folder / shard_manifest_file(rank)
    if not path.is_file():
        raise CheckpointError(
            f"the files of rank {rank} did not arrive",
            where=str(folder),
            why="rank 0 does not see them",
            hint="`save` must be on a file system that all nodes share",
        )
    return read_json(path)


def merge_shard_manifests(folder: Path, world_size: int) -> MergedManifest:
    """Read, merge and remove the shard manifests of all ranks.

    Raises:
        CheckpointError: one is missing, or the ranks did not write every tensor exactly once.
    """
    merged = MergedManifest({}, {}, {})
    for rank in range(world_size):
        body = _read(folder, rank)
        merged.files.update({name: file_entry(entry) for name, entry in body["files"].items()})
        for name, value in body["weights"].items():
            entry = weight_entry(value)
            before = merged.weights[name].parts if name in merged.weights else ()
            merged.weights[name] = replace(entry, parts=before + entry.parts)
        for name, value in body["optimizer"].items():
            shard = OptimizerShard(**{**value, "moments": tuple(value["moments"])})
            merged.optimizer[name] = (*merged.optimizer.get(name, ()), shard)
    check_complete(merged)
    for rank in range(world_size):
        (folder / shard_manifest_file(rank)).unlink()
    return merged


def check_complete(merged: MergedManifest) -> None:
    """Raise CheckpointError naming the tensor whose stored shards overlap or do not cover it."""
    for name, entry in merged.weights.items():
        ranges: dict[Any, list[tuple[int, int]]] = {}
        for shard in merged.optimizer.get(name, ()):
            key = (entry.optimizer_span(shard).base, shard.pp, shard.tp)
            ranges.setdefault(key, []).append((shard.range_start, shard.range_stop))
        try:
            check_tiles(name, entry.shape, [entry.slice_of(shard) for shard in entry.parts], ranges)
        except ValueError as error:
            raise CheckpointError(f"'{name}' was not written completely", why=str(error)) from error
