"""Saving: every rank writes its own files into a temporary folder; rank 0 writes the manifest and renames the folder.

An error on any rank (such as a full disk) becomes one CheckpointError on all ranks; the temporary folder is removed, and the
previous checkpoints and `latest` stay as they were. `commit.py` has the order of renames.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import safetensors
import torch
from torch import Tensor

from megatron.checkpoint import commit
from megatron.checkpoint.block_hashes import FileEntry, text_entry
from megatron.checkpoint.collective_errors import CollectiveError, exchange
from megatron.checkpoint.layout import tag_of
from megatron.checkpoint.manifest import Manifest, write_manifest
from megatron.checkpoint.retention import retain
from megatron.checkpoint.safetensors_writer import write_files
from megatron.checkpoint.shard_contents import ShardContents, add_weights, collect_contents
from megatron.checkpoint.shard_manifests import merge_shard_manifests, write_shard_manifest
from megatron.engine.base import Engine
from megatron.errors import CheckpointError
from megatron.files import atomic_open, write_text
from megatron.parallel.mesh import Mesh
from megatron.parallel.shard_spec import ParamSpec

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointMetadata:
    """What a checkpoint stores besides the tensors.

    Attributes:
        model_config: compared when the checkpoint is loaded.
        config_texts: file name -> original YAML text, for `configs/`.
        tokenizer: file name -> path of a file to copy into `tokenizer/`.
        facts: any JSON-serializable metadata (tokenizer type, fingerprint of the data).
    """

    model_config: Mapping[str, Any]
    config_texts: Mapping[str, str] = field(default_factory=dict)
    tokenizer: Mapping[str, str | Path] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SaveOptions(CheckpointMetadata):
    """How to save; the same at every step of a run and on all ranks.

    Attributes:
        keep_last: checkpoints to retain, at least two; None keeps all.
        keep: steps that are never deleted.
        save_optimizer: write the optimizer state.
        save_rng: write the random number generator states.
    """

    keep_last: int | None = None
    keep: Collection[int] = ()
    save_optimizer: bool = True
    save_rng: bool = True


@dataclass(frozen=True)
class Snapshot:
    """Everything that one rank writes for one step, and what rank 0 needs for the manifest."""

    contents: ShardContents
    mesh: Mesh
    state: Mapping[str, Any]
    metadata: CheckpointMetadata
    engine_state: Mapping[str, Any]

    @property
    def iteration(self) -> int:
        """The step."""
        return int(self.state["iteration"])


def save_checkpoint(folder: str | Path, engine: Engine, state: Mapping[str, Any], options: SaveOptions) -> Path:
    """Save a running engine; every rank must call this at the same step, with the same arguments.

    Args:
        folder: the save folder, shared by all nodes.
        engine: the engine to save.
        state: the training state, JSON-serializable, with `iteration`.
        options: metadata and what to keep.

    Returns:
        `<folder>/global_step<iteration>`.

    Raises:
        CheckpointError: on all ranks, if any of them could not write; previous checkpoints are unchanged.
    """
    return write_snapshot(Path(folder), take_snapshot(Path(folder), engine, state, options), options)


def take_snapshot(
    folder: Path,
    engine: Engine,
    state: Mapping[str, Any],
    options: SaveOptions,
    *,
    copy: Callable[[ShardContents], None] | None = None,
    group: ProcessGroup | None = None,
) -> Snapshot:
    """Collect what this rank writes.

    Args:
        folder: the save folder, for messages.
        engine: the engine to save.
        state: the training state.
        options: what to save.
        copy: replaces the tensors by copies. Without it the snapshot shares memory with the engine, which must not step
            before the snapshot is written.
        group: process group of all ranks for the error check; None is the default group.

    Raises:
        CheckpointError: on all ranks, if a rank's engine could not provide its state (such as out of memory).
    """
    errors, contents = save_errors(folder, state["iteration"], group), ShardContents()
    with errors.capture():
        contents = collect_contents(engine, save_optimizer=options.save_optimizer, save_rng=options.save_rng)
        if copy is not None:
            copy(contents)
    errors.raise_on_all_ranks()
    return Snapshot(contents, engine.mesh, dict(state), options, engine.extra_state())


def write_snapshot(folder: Path, snapshot: Snapshot, options: SaveOptions, group: ProcessGroup | None = None) -> Path:
    """Write and publish a snapshot, then delete old checkpoints; every rank calls this.

    Raises:
        CheckpointError: as `save_checkpoint`.
    """
    path = _write(folder, snapshot, group)
    if snapshot.mesh.rank == 0:
        for problem in retain(folder, snapshot.iteration, options.keep_last, options.keep):
            _log.warning(problem)
    return path


def save_weights(
    folder: str | Path,
    weights: Mapping[str, Tensor],
    specs: Mapping[str, ParamSpec],
    *,
    model_config: Mapping[str, Any],
    iteration: int = 0,
    state: Mapping[str, Any] | None = None,
    config_texts: Mapping[str, str] | None = None,
    tokenizer: Mapping[str, str | Path] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint of full weights without an engine (for imports): one process, no optimizer state.

    Args:
        folder: the save folder.
        weights: logical name -> full tensor.
        specs: logical name -> shape and sharding.
        model_config: of the model.
        iteration: step of the checkpoint.
        state: further training state.
        config_texts: see `CheckpointMetadata`.
        tokenizer: see `CheckpointMetadata`.
        facts: see `CheckpointMetadata`.

    Returns:
        `<folder>/global_step<iteration>`.

    Raises:
        CheckpointError: it cannot be written, a shape differs from its spec, or a weight is not finite.
    """
    contents, errors = ShardContents(), save_errors(Path(folder), iteration)
    with errors.capture():
        for name, tensor in weights.items():
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"'{name}' holds inf or NaN", why="such weights can neither be trained nor measured")
        add_weights(contents, weights, specs, Mesh.single())
    errors.raise_on_all_ranks()
    metadata = CheckpointMetadata(model_config, config_texts or {}, tokenizer or {}, facts or {})
    state = {**(state or {}), "iteration": iteration}
    return _write(Path(folder), Snapshot(contents, Mesh.single(), state, metadata, {}), None)


def save_errors(folder: Path, iteration: int, group: ProcessGroup | None = None) -> CollectiveError:
    """The error check of one save."""
    text = f"the checkpoint of step {iteration} could not be saved; the earlier ones are untouched"
    return CollectiveError(text, str(folder), group)


def _write(folder: Path, snapshot: Snapshot, group: ProcessGroup | None) -> Path:
    mesh, contents, iteration = snapshot.mesh, snapshot.contents, snapshot.iteration
    # Each rank proposes a save id and sends its size: all take rank 0's id, and rank 0 checks the space for all of them.
    proposals = [json.loads(text) for text in exchange(json.dumps([commit.new_save_id(), contents.size]), group)]
    save_id, needed = proposals[0][0], sum(size for _, size in proposals)
    temporary = commit.temporary_folder(folder, iteration, save_id)
    header = {"save_id": save_id, "iteration": str(iteration)}
    errors = save_errors(folder, iteration, group)
    # Three phases with a collective error check after each: no rank writes before the folder exists, and rank 0 publishes
    # only when every rank has written and synced its files.
    try:
        with errors.capture():
            if mesh.rank == 0:
                _prepare(folder, temporary, needed)
        errors.raise_on_all_ranks()
        with errors.capture():
            written = write_files(temporary, contents.files, header)
            write_shard_manifest(temporary, mesh.rank, contents, written)
        errors.raise_on_all_ranks()
        with errors.capture():
            if mesh.rank == 0:
                sizes = {"pp": mesh.pp, "dp": mesh.dp, "tp": mesh.tp}
                describe(temporary, sizes, save_id, snapshot.state, snapshot.metadata, snapshot.engine_state)
                commit.publish(temporary, iteration)
        errors.raise_on_all_ranks()
    except BaseException:
        if mesh.rank == 0:
            commit.discard(temporary)
        raise
    return folder / tag_of(iteration)


def _prepare(folder: Path, temporary: Path, needed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in commit.recover(folder):
        _log.warning("removed or restored %s, left behind by an interrupted save", folder / name)
    commit.check_space(folder, needed)
    temporary.mkdir()


def describe(
    temporary: Path,
    mesh: Mapping[str, int],
    save_id: str,
    state: Mapping[str, Any],
    metadata: CheckpointMetadata,
    engine_state: Mapping[str, Any],
) -> None:
    """On rank 0, when all ranks have written: merge their manifests, add the metadata files, write `manifest.json` last."""
    merged = merge_shard_manifests(temporary, math.prod(mesh.values()))
    merged.files.update(_copy_metadata_files(temporary, metadata))
    manifest = Manifest(
        iteration=int(state["iteration"]),
        save_id=save_id,
        mesh=mesh,
        model_config=metadata.model_config,
        state=state,
        engine=engine_state,
        facts=metadata.facts,
        versions=_versions(),
        weights=merged.weights,
        optimizer=merged.optimizer,
        files=merged.files,
    )
    write_manifest(temporary, manifest)


def _copy_metadata_files(temporary: Path, metadata: CheckpointMetadata) -> dict[str, FileEntry]:
    written = []
    if metadata.config_texts:
        (temporary / "configs").mkdir()
    for name, text in metadata.config_texts.items():
        written.append(temporary / "configs" / Path(name).name)
        write_text(written[-1], text)
    if metadata.tokenizer:
        (temporary / "tokenizer").mkdir()
    for name, source in metadata.tokenizer.items():
        written.append(temporary / "tokenizer" / Path(name).name)
        try:
            with open(source, "rb") as original, atomic_open(written[-1]) as copy:
                shutil.copyfileobj(original, copy)
        except FileNotFoundError as error:
            raise CheckpointError("a tokenizer file no longer exists", where=str(source), why=str(error)) from error
    return {path.relative_to(temporary).as_posix(): text_entry(path) for path in written}


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "safetensors": safetensors.__version__,
    }
