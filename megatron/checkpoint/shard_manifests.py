"""Receipts: each rank leaves a small JSON of what it wrote in the temporary folder; rank 0 joins them into the
manifest.

Joining checks that the pieces cover every tensor exactly once, so that a checkpoint which could not be read back is
refused while the old one is still there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.checkpoint.block_hashes import FileEntry, file_entry
from megatron.checkpoint.layout import receipt_file
from megatron.checkpoint.manifest import OptimizerPart, WeightEntry, weight_entry
from megatron.checkpoint.shard_contents import ShardContents
from megatron.checkpoint.validate import check_tiles
from megatron.errors import CheckpointError
from megatron.files import read_json, write_json


@dataclass(frozen=True)
class Joined:
    """What all ranks together wrote."""

    files: dict[str, FileEntry]
    weights: dict[str, WeightEntry]
    optimizer: dict[str, tuple[OptimizerPart, ...]]


def write_receipt(folder: Path, rank: int, holdings: ShardContents, files: Mapping[str, FileEntry]) -> None:
    """Leave this rank's receipt in the temporary folder."""
    body = {
        "files": {name: asdict(entry) for name, entry in files.items()},
        "weights": {name: asdict(entry) for name, entry in holdings.weights.items()},
        "optimizer": {name: asdict(part) for name, part in holdings.optimizer.items()},
    }
    write_json(folder / receipt_file(rank), body)


def _read(folder: Path, rank: int) -> dict[str, Any]:
    path = folder / receipt_file(rank)
    if not path.is_file():
        raise CheckpointError(
            f"the files of rank {rank} did not arrive",
            where=str(folder),
            why="rank 0 does not see them",
            hint="`save` must lie on a file system that all nodes share",
        )
    return read_json(path)


def take_receipts(folder: Path, world_size: int) -> Joined:
    """Read, join and remove the receipts of all ranks.

    Raises:
        CheckpointError: a receipt is missing, or the ranks together did not write every tensor exactly once.
    """
    joined = Joined({}, {}, {})
    for rank in range(world_size):
        body = _read(folder, rank)
        joined.files.update({name: file_entry(entry) for name, entry in body["files"].items()})
        for name, value in body["weights"].items():
            entry, known = weight_entry(value), joined.weights.get(name)
            if known is not None:
                entry = WeightEntry(known.shape, known.dtype, known.cut, known.stage, known.parts + entry.parts)
            joined.weights[name] = entry
        for name, value in body["optimizer"].items():
            part = OptimizerPart(**{**value, "moments": tuple(value["moments"])})
            joined.optimizer[name] = (*joined.optimizer.get(name, ()), part)
    check_complete(joined)
    for rank in range(world_size):
        (folder / receipt_file(rank)).unlink()
    return joined


def check_complete(joined: Joined) -> None:
    """Raise CheckpointError naming the tensor whose stored pieces leave a hole or overlap."""
    for name, entry in joined.weights.items():
        held: dict[Any, list[tuple[int, int]]] = {}
        for part in joined.optimizer.get(name, ()):
            held.setdefault((entry.optimizer_span(part).part, part.pp, part.tp), []).append((part.range_start, part.range_stop))
        try:
            check_tiles(name, entry.shape, [entry.slice_of(part) for part in entry.parts], held)
        except ValueError as error:
            raise CheckpointError(f"'{name}' was not written completely", why=str(error)) from error
