"""Loading: plan this rank's reads from the manifest, read and verify them, and pass the tensors to the engine.

Weights, optimizer masters and moments are resharded for any mesh while they are read; there is no offline step. All ranks
read and verify before any of them changes its engine, and a damaged file on one rank is an error on all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.collective_errors import CollectiveError
from megatron.checkpoint.compare import check_model, check_names, model_problems
from megatron.checkpoint.layout import MANIFEST, RNG
from megatron.checkpoint.manifest import Manifest, read_manifest
from megatron.checkpoint.regions import FlatRange
from megatron.checkpoint.reshard import MASTER, MeshPosition, OptimizerReads, Read
from megatron.checkpoint.rng_state import mesh_text, reseed, saved_rng_file
from megatron.checkpoint.safetensors_reader import file_damage
from megatron.checkpoint.shard_contents import local_slice
from megatron.checkpoint.tensor_reader import CheckpointReader, TensorRequest
from megatron.engine.base import Engine, OptimizerSlice
from megatron.errors import CheckpointError, DamagedCheckpoint
from megatron.parallel.random import check_rng, restore_rng

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadOptions:
    """What to load and how; the same on all ranks.

    Attributes:
        model_config: this run's model, compared with the saved one; None skips the comparison.
        load_optimizer: False (no_load_optim) keeps the step but starts the moments at zero.
        load_rng: False (no_load_rng) keeps this run's random number generators. True restores their states if the pipeline
            and data-parallel sizes are those of the save; on another mesh it reseeds from (seed, step, rank) and logs that.
        finetune: weights only; no optimizer, no random number states, and an empty training state (step 0).
        verify: compare the SHA-256 of everything this rank reads; sizes and save ids are always compared.
        in_place: read straight into the engine's memory. Damage is still detected before `load_checkpoint` returns, but the
            engine then holds part of the damaged checkpoint and must load another one or stop.
    """

    model_config: Mapping[str, Any] | None = None
    load_optimizer: bool = True
    load_rng: bool = True
    finetune: bool = False
    verify: bool = True
    in_place: bool = False

    @property
    def reads_optimizer(self) -> bool:
        """Whether optimizer state is read."""
        return self.load_optimizer and not self.finetune

    @property
    def reads_rng(self) -> bool:
        """Whether random number states are read."""
        return self.load_rng and not self.finetune


def load_checkpoint(
    path: str | Path,
    engine: Engine,
    options: LoadOptions | None = None,
    *,
    on_manifest: Callable[[Manifest], object] | None = None,
) -> dict[str, Any]:
    """Load a checkpoint of any mesh into a running engine; every rank must call this.

    Args:
        path: the checkpoint's folder, from `find_checkpoint`.
        engine: the engine to load into.
        options: None is `LoadOptions()`.
        on_manifest: called with the manifest, on every rank, before any tensor is read.

    Returns:
        The training state as it was saved; empty for `finetune`.

    Raises:
        DamagedCheckpoint: on all ranks: a file is missing, damaged or unreadable on any of them. Unless `in_place`, no engine
            was changed.
        CheckpointError: on all ranks: the checkpoint is of another model, or has no optimizer state.
    """
    path, options = Path(path), options or LoadOptions()
    errors = CollectiveError("the checkpoint could not be loaded", str(path))
    with errors.capture():
        manifest = read_manifest(path)
        _check(path, manifest, engine, options)
        if on_manifest is not None:
            on_manifest(manifest)
        tensors = _read(path, manifest, engine, options)
    errors.raise_on_all_ranks()  # before any engine is changed: either all ranks load this checkpoint, or none does
    with errors.capture():
        _apply(engine, manifest, tensors, options)
    errors.raise_on_all_ranks()
    return {} if options.finetune else dict(manifest.state)


@dataclass(frozen=True)
class _RankTensors:
    """What one rank has read; `optimizer` and `rng` are None if they were not requested or not saved."""

    weights: dict[str, Tensor]
    optimizer: dict[str, OptimizerSlice] | None
    rng: dict[str, Tensor] | None


def _check(path: Path, manifest: Manifest, engine: Engine, options: LoadOptions) -> None:
    if options.model_config is not None:
        allowed = check_model(path, manifest, options.model_config)
        if engine.mesh.rank == 0 and allowed:
            _log.warning("differs from the checkpoint: %s", "; ".join(allowed))
    shapes = {name: spec.shape for name, spec in engine.specs.items()}
    check_names(path, manifest, shapes, same_model=options.model_config is not None)
    if options.reads_optimizer and not manifest.optimizer:
        hint = "set no_load_optim or finetune to start without"
        raise CheckpointError("the checkpoint holds no optimizer state", where=str(path), hint=hint)
    text = mesh_text(manifest, engine.mesh)
    if text and engine.mesh.rank == 0:
        _log.info("reshard at load: %s", text)


def _read(path: Path, manifest: Manifest, engine: Engine, options: LoadOptions) -> _RankTensors:
    """Read this rank's tensors; unless `in_place`, the engine is not touched yet."""
    with CheckpointReader(path, manifest, verify=options.verify) as reader:
        weights = _read_weights(reader, engine, options.in_place)
        optimizer = _read_optimizer(reader, engine, options.in_place) if options.reads_optimizer else None
        file = saved_rng_file(manifest, engine.mesh) if options.reads_rng else None
        rng = reader.read_file(file) if file else None
    if rng is not None:
        _check_rng_file(path / str(file), rng)
    return _RankTensors(weights, optimizer, rng)


def _check_rng_file(file: Path, rng: dict[str, Tensor]) -> None:
    """Report random number states that cannot be restored as damage, before the engine is changed."""
    try:
        check_rng(rng)
    except CheckpointError as error:
        raise DamagedCheckpoint(error.what, where=str(file), why=error.why) from error


def _destination(tensor: Tensor, in_place: bool) -> Tensor | None:
    """The engine's memory to read into; None where the bytes cannot go there directly."""
    return tensor.detach() if in_place and tensor.device.type == "cpu" and tensor.is_contiguous() else None


def _read_weights(reader: CheckpointReader, engine: Engine, in_place: bool) -> dict[str, Tensor]:
    mesh, parameters = engine.mesh, engine.parameters()
    position = MeshPosition(mesh.pp_rank, mesh.tp_rank)
    requests = (
        replace(
            reader.weight_request(name, local_slice(engine.specs[name], mesh), position), into=_destination(param, in_place)
        )
        for name, param in parameters.items()
    )
    return dict(zip(parameters, reader.tensors(requests), strict=True))


def _read_optimizer(reader: CheckpointReader, engine: Engine, in_place: bool) -> dict[str, OptimizerSlice]:
    """The ranges that this rank's engine owns, filled from the stored ranges."""
    mesh = engine.mesh
    position = MeshPosition(mesh.pp_rank, mesh.tp_rank)
    plans: dict[str, OptimizerReads] = {}
    slices = engine.optimizer_slices()
    for name, owned in slices.items():
        span = FlatRange(local_slice(engine.specs[name], mesh), owned.start, owned.stop)
        plans[name] = reader.optimizer_reads(name, span, position)
    # In fp32 a master may be the weight itself, which is read from its own file: two reads must not share memory.
    weights = {param.data_ptr() for param in engine.parameters().values()}
    destinations = {
        (name, kind): _destination(tensor, in_place and tensor.data_ptr() not in weights)
        for name, owned in slices.items()
        for kind, tensor in {"master": owned.master, **owned.moments}.items()
    }
    return read_slices(reader, plans, destinations)


def read_slices(
    reader: CheckpointReader,
    plans: Mapping[str, OptimizerReads],
    destinations: Mapping[tuple[str, str], Tensor | None] | None = None,
) -> dict[str, OptimizerSlice]:
    """Read optimizer slices onto the CPU.

    Args:
        reader: an open checkpoint.
        plans: parameter name -> the reads of its range.
        destinations: (name, "master" or a moment) -> memory to read into, see `TensorRequest`.
    """
    result, into = {}, destinations or {}
    tensors = reader.tensors(
        _flat(name, plan, reads, into.get((name, kind))) for name, plan in plans.items() for kind, reads in _all(plan).items()
    )
    for name, plan in plans.items():
        master = next(tensors)
        moments = {moment: next(tensors) for moment in plan.moments}
        result[name] = OptimizerSlice(plan.span.start, plan.span.stop, master, moments, plan.step)
    return result


def _all(plan: OptimizerReads) -> dict[str, tuple[Read, ...]]:
    return {"master": plan.master, **plan.moments}


def _flat(name: str, plan: OptimizerReads, reads: tuple[Read, ...], into: Tensor | None) -> TensorRequest:
    return TensorRequest(name, (plan.span.stop - plan.span.start,), torch.float32, reads, into)


def _apply(engine: Engine, manifest: Manifest, tensors: _RankTensors, options: LoadOptions) -> None:
    engine.load_weights(tensors.weights)
    if tensors.optimizer is None:
        engine.refresh_master_from_weights()
    else:
        engine.load_optimizer_slices(tensors.optimizer)
        engine.load_extra_state(manifest.engine)
    if tensors.rng is not None:
        restore_rng(tensors.rng)
    elif options.reads_rng:
        reseed(manifest, engine.settings.seed, engine.mesh)


def read_full_weights(path: str | Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Read full weights from a checkpoint of any mesh, on the CPU, in the dtype they were saved in.

    Args:
        path: a `global_step<N>` folder.
        names: which weights; None reads all.

    Raises:
        CheckpointError: a file is missing or damaged, or a name is unknown; the message names it.
    """
    path = Path(path)
    manifest = read_manifest(path)
    with CheckpointReader(path, manifest) as reader:
        names = list(manifest.weights if names is None else names)
        return dict(zip(names, reader.tensors(reader.weight_request(name) for name in names), strict=True))


def damages(path: str | Path) -> list[str]:
    """List everything that is damaged in a checkpoint, one line each: file, tensor, bytes. Reads every byte.

    If the list is empty, a resume on any mesh can only refuse the checkpoint as another model's: the manifest passes the same
    checks, and every stored shard is looked up as a rank would read it.
    """
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [f"{MANIFEST}: {error.what}: {error.why or ''}"]
    lines = [line for name, entry in manifest.files.items() for line in file_damage(Path(path) / name, entry)]
    return lines or _contradictions(Path(path), manifest)


def _contradictions(path: Path, manifest: Manifest) -> list[str]:
    """Where intact files contradict the manifest: tensors of another shape or dtype, random number states that do not load."""
    lines = [f"{MANIFEST}: {problem}" for problem in model_problems(manifest)]
    with CheckpointReader(path, manifest, verify=False) as reader:
        for name, entry in manifest.weights.items():
            for shard in entry.parts:
                form = (entry.slice_of(shard).local_shape, getattr(torch, entry.dtype))
                lines += _form_problems(reader, shard.file, {name: form})
        for name, shards in manifest.optimizer.items():
            for owned in shards:
                flat = ((owned.range_stop - owned.range_start,), torch.float32)
                lines += _form_problems(reader, owned.file, {f"{kind}/{name}": flat for kind in (MASTER, *owned.moments)})
        for file in manifest.files:
            try:
                if file.startswith(RNG):
                    check_rng(reader.read_file(file))
            except CheckpointError as error:
                lines.append(f"{file}: {error.what}" + (f": {error.why}" if error.why else ""))
    return lines


def _form_problems(reader: CheckpointReader, file: str, forms: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> list[str]:
    lines = []
    for key, expected in forms.items():
        try:
            stored = reader.reader(file).form(key)
            if stored != expected:
                lines.append(
                    f"{file}: '{key}' is {list(stored[0])} {stored[1]}, the manifest says {list(expected[0])} {expected[1]}"
                )
        except CheckpointError as error:
            lines.append(f"{file}: {error.what}: {error.why or key}")
    return lines


def verify_checkpoint(path: str | Path) -> Manifest:
    """Check every file of a checkpoint against its manifest, and return the manifest; damage raises DamagedCheckpoint."""
    manifest, lines = read_manifest(path), damages(path)
    if lines:
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise DamagedCheckpoint("the checkpoint is damaged", where=str(path), why=lines[0] + more)
    return manifest
