"""Saving: every rank writes its own files into a temporary folder, rank 0 describes them and gives the folder its name.

An error on any rank (a full disk) ends as one CheckpointError on all of them, with the temporary folder removed and the
last good checkpoint and `latest` as they were. The order of renames is in `commit.py`.
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
from megatron.checkpoint.shard_contents import ShardContents, add_weights, engine_holdings
from megatron.checkpoint.shard_manifests import take_receipts, write_receipt
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
    """What rides along with the tensors.

    model_config: compared at load. config_texts: file name -> original YAML text, for `configs/`.
    tokenizer: file name -> path of a file to copy into `tokenizer/`. facts: anything JSON-able worth keeping
    (tokenizer type, fingerprint of the data).
    """

    model_config: Mapping[str, Any]
    config_texts: Mapping[str, str] = field(default_factory=dict)
    tokenizer: Mapping[str, str | Path] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """All that one rank writes of one step, and what rank 0 needs to describe it."""

    holdings: ShardContents
    mesh: Mesh
    state: Mapping[str, Any]
    companions: CheckpointMetadata
    engine_state: Mapping[str, Any]

    @property
    def iteration(self) -> int:
        """The step."""
        return int(self.state["iteration"])


@dataclass(frozen=True)
class SaveOptions:
    """How to save, the same at every step of a run and on all ranks.

    model_config, config_texts, tokenizer, facts: see `CheckpointMetadata`.
    keep_last: checkpoints to retain, at least two; None for all. keep: steps never deleted.
    """

    model_config: Mapping[str, Any]
    config_texts: Mapping[str, str] = field(default_factory=dict)
    tokenizer: Mapping[str, str | Path] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    keep_last: int | None = None
    keep: Collection[int] = ()
    save_optimizer: bool = True
    save_rng: bool = True


def save_checkpoint(folder: str | Path, engine: Engine, state: Mapping[str, Any], **options: Any) -> Path:
    """Save a running engine; every rank must call this at the same step, with the same arguments.

    Args:
        folder: the save folder, shared by all nodes. state: the training state, JSON-able, with `iteration`.
        options: the fields of `SaveOptions`; `model_config` is required.

    Returns:
        `<folder>/global_step<iteration>`.

    Raises:
        CheckpointError: on all ranks, when any of them could not write; nothing that was whole before has changed.
    """
    chosen = SaveOptions(**options)
    return write_snapshot(Path(folder), take_snapshot(Path(folder), engine, state, chosen), chosen)


def take_snapshot(
    folder: Path,
    engine: Engine,
    state: Mapping[str, Any],
    options: SaveOptions,
    *,
    copy: Callable[[ShardContents], None] | None = None,
    group: ProcessGroup | None = None,
) -> Snapshot:
    """What this rank will write; without `copy` it shares memory with the engine, which must then not step meanwhile.

    Raises:
        CheckpointError: on all ranks, when a rank's engine could not give its state (out of memory).
    """
    verdict, holdings = save_verdict(folder, state["iteration"], group), ShardContents()
    with verdict.capture():
        holdings = engine_holdings(engine, save_optimizer=options.save_optimizer, save_rng=options.save_rng)
        if copy is not None:
            copy(holdings)
    verdict.raise_on_all_ranks()
    companions = CheckpointMetadata(options.model_config, options.config_texts, options.tokenizer, options.facts)
    return Snapshot(holdings, engine.mesh, dict(state), companions, engine.extra_state())


def write_snapshot(folder: Path, snapshot: Snapshot, options: SaveOptions, group: ProcessGroup | None = None) -> Path:
    """Write, publish, and delete what is superfluous then; every rank calls this.

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
    """Make a checkpoint of full weights without an engine (imports of other formats): one process, no optimizer state.

    Raises:
        CheckpointError: it cannot be written, a shape differs from its spec, or a weight is not finite.
    """
    holdings, verdict = ShardContents(), save_verdict(Path(folder), iteration)
    with verdict.capture():
        for name, tensor in weights.items():
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"'{name}' holds inf or NaN", why="such weights can neither be trained nor measured")
        add_weights(holdings, weights, specs, Mesh.single())
    verdict.raise_on_all_ranks()
    companions = CheckpointMetadata(model_config, config_texts or {}, tokenizer or {}, facts or {})
    state = {**(state or {}), "iteration": iteration}
    return _write(Path(folder), Snapshot(holdings, Mesh.single(), state, companions, {}), None)


def save_verdict(folder: Path, iteration: int, group: ProcessGroup | None = None) -> CollectiveError:
    """The verdict of one save."""
    text = f"the checkpoint of step {iteration} could not be saved; the earlier ones are untouched"
    return CollectiveError(text, str(folder), group)


def _write(folder: Path, snapshot: Snapshot, group: ProcessGroup | None) -> Path:
    mesh, holdings, iteration = snapshot.mesh, snapshot.holdings, snapshot.iteration
    offers = [json.loads(text) for text in exchange(json.dumps([commit.new_save_id(), holdings.size]), group)]
    save_id, needed = offers[0][0], sum(size for _, size in offers)
    temporary = commit.temporary_folder(folder, iteration, save_id)
    header = {"save_id": save_id, "iteration": str(iteration)}
    verdict = save_verdict(folder, iteration, group)
    try:
        with verdict.capture():
            if mesh.rank == 0:
                _prepare(folder, temporary, needed)
        verdict.raise_on_all_ranks()
        with verdict.capture():
            written = write_files(temporary, holdings.files, header)
            write_receipt(temporary, mesh.rank, holdings, written)
        verdict.raise_on_all_ranks()
        with verdict.capture():
            if mesh.rank == 0:
                sizes = {"pp": mesh.pp, "dp": mesh.dp, "tp": mesh.tp}
                describe(temporary, sizes, save_id, snapshot.state, snapshot.companions, snapshot.engine_state)
                commit.publish(temporary, iteration)
        verdict.raise_on_all_ranks()
    except BaseException:
        if mesh.rank == 0:
            commit.discard(temporary)
        raise
    return folder / tag_of(iteration)


def _prepare(folder: Path, temporary: Path, needed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in commit.recover(folder):
        _log.warning("an interrupted save had left %s, cleared", folder / name)
    commit.check_space(folder, needed)
    temporary.mkdir()


def describe(
    temporary: Path,
    mesh: Mapping[str, int],
    save_id: str,
    state: Mapping[str, Any],
    companions: CheckpointMetadata,
    engine_state: Mapping[str, Any],
) -> None:
    """Rank 0, when all files and receipts are there: add the companions, join the receipts, write the manifest, last."""
    joined = take_receipts(temporary, math.prod(mesh.values()))
    joined.files.update(_copy_companions(temporary, companions))
    manifest = Manifest(
        iteration=int(state["iteration"]),
        save_id=save_id,
        mesh=mesh,
        model_config=companions.model_config,
        state=state,
        engine=engine_state,
        facts=companions.facts,
        versions=_versions(),
        weights=joined.weights,
        optimizer=joined.optimizer,
        files=joined.files,
    )
    write_manifest(temporary, manifest)


def _copy_companions(temporary: Path, companions: CheckpointMetadata) -> dict[str, FileEntry]:
    written = []
    if companions.config_texts:
        (temporary / "configs").mkdir()
    for name, text in companions.config_texts.items():
        written.append(temporary / "configs" / Path(name).name)
        write_text(written[-1], text)
    if companions.tokenizer:
        (temporary / "tokenizer").mkdir()
    for name, source in companions.tokenizer.items():
        written.append(temporary / "tokenizer" / Path(name).name)
        try:
            with open(source, "rb") as original, atomic_open(written[-1]) as copy:
                shutil.copyfileobj(original, copy)
        except FileNotFoundError as error:
            raise CheckpointError("a tokenizer file is gone", where=str(source), why=str(error)) from error
    return {path.relative_to(temporary).as_posix(): text_entry(path) for path in written}


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "safetensors": safetensors.__version__,
    }
