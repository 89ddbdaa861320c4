"""Loading: work out what this rank needs from the manifest, read and verify it, and hand it to the engine.

Weights, optimizer masters and moments are resharded for any mesh while they are read, without an offline step. All ranks read
and verify before any of them changes its engine, and one rank's damaged file is an error on all.
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
from megatron.checkpoint.damage import DamagedCheckpoint
from megatron.checkpoint.layout import MANIFEST, RNG
from megatron.checkpoint.manifest import Manifest, read_manifest
from megatron.checkpoint.regions import FlatRange
from megatron.checkpoint.reshard import MASTER, OptimizerReads, Place, Read
from megatron.checkpoint.rng_state import begin_streams, mesh_text, saved_streams
from megatron.checkpoint.safetensors_reader import damage_of
from megatron.checkpoint.shard_contents import local_slice
from megatron.checkpoint.tensor_reader import Source, TensorRequest
from megatron.engine.base import Engine, OptimizerSlice
from megatron.errors import CheckpointError
from megatron.parallel.random import check_rng, restore_rng

_log = logging.getLogger(__name__)


def load_checkpoint(
    path: str | Path,
    engine: Engine,
    *,
    model_config: Mapping[str, Any] | None = None,
    load_optimizer: bool = True,
    load_rng: bool = True,
    finetune: bool = False,
    verify: bool = True,
    in_place: bool = False,
    look: Callable[[Manifest], object] | None = None,
) -> dict[str, Any]:
    """Load a checkpoint of any mesh into a running engine; every rank must call this.

    Args:
        path: the folder that `find_checkpoint` gave.
        model_config: this run's model; compared with the saved one when given.
        load_optimizer: False (no_load_optim) keeps the step but starts the moments at zero.
        load_rng: False (no_load_rng) keeps this run's random numbers. True restores them where pipeline and data sizes are
            those of the save; on another mesh they start again from (seed, step, rank), which the log says.
        finetune: weights only; no optimizer, no random numbers, and an empty state (step 0).
        verify: compare the SHA-256 of all that this rank reads; sizes and save ids are compared in any case.
        in_place: read straight into the engine's memory, for an engine that has nothing to lose: damage is found all the same
            before this returns, but the engine then holds part of the damaged checkpoint, and must load another or end.
        look: called with the manifest, on every rank, before a tensor is read.

    Returns:
        The training state as it was saved; empty for `finetune`.

    Raises:
        DamagedCheckpoint: on all ranks: a missing, damaged or unreadable file on any of them. Unless `in_place`, no engine
            was changed.
        CheckpointError: on all ranks: another model, no optimizer state.
    """
    path = Path(path)
    wanted = _Options(load_optimizer and not finetune, load_rng and not finetune, verify, in_place)
    verdict = CollectiveError("the checkpoint could not be loaded", str(path))
    with verdict.capture():
        manifest = read_manifest(path)
        _check(path, manifest, engine, model_config, wanted.optimizer)
        if look is not None:
            look(manifest)
        found = _read(path, manifest, engine, wanted)
    verdict.raise_on_all_ranks()
    with verdict.capture():
        _hand_over(engine, manifest, found)
    verdict.raise_on_all_ranks()
    return {} if finetune else dict(manifest.state)


@dataclass(frozen=True)
class _Options:
    optimizer: bool
    rng: bool
    verify: bool
    in_place: bool


@dataclass(frozen=True)
class _Found:
    """What was read for one rank. optimizer, rng: None where it was not wanted or is not there. rng_wanted: see above."""

    weights: dict[str, Tensor]
    optimizer: dict[str, OptimizerSlice] | None
    rng: dict[str, Tensor] | None
    rng_wanted: bool


def _check(path: Path, manifest: Manifest, engine: Engine, model_config: Mapping[str, Any] | None, optimizer: bool) -> None:
    if model_config is not None:
        allowed = check_model(path, manifest, model_config)
        if engine.mesh.rank == 0 and allowed:
            _log.warning("differs from the checkpoint: %s", "; ".join(allowed))
    check_names(path, manifest, {name: spec.shape for name, spec in engine.specs.items()}, same_model=model_config is not None)
    if optimizer and not manifest.optimizer:
        hint = "set no_load_optim or finetune to start without"
        raise CheckpointError("the checkpoint holds no optimizer state", where=str(path), hint=hint)
    text = mesh_text(manifest, engine.mesh)
    if text and engine.mesh.rank == 0:
        _log.info("reshard at load: %s", text)


def _read(path: Path, manifest: Manifest, engine: Engine, options: _Options) -> _Found:
    """Read this rank's tensors; nothing of the engine is touched yet."""
    with Source(path, manifest, verify=options.verify) as source:
        weights = _read_weights(source, engine, options.in_place)
        optimizer = _read_optimizer(source, engine, options.in_place) if options.optimizer else None
        file = saved_streams(manifest, engine.mesh) if options.rng else None
        rng = source.whole_file(file) if file else None
    if rng is not None:
        _check_streams(path / str(file), rng)
    return _Found(weights, optimizer, rng, options.rng)


def _check_streams(file: Path, rng: dict[str, Tensor]) -> None:
    """Before the engine is touched: random numbers that cannot be restored are damage like any other."""
    try:
        check_rng(rng)
    except CheckpointError as error:
        raise DamagedCheckpoint(error.what, where=str(file), why=error.why) from error


def _home(tensor: Tensor, in_place: bool) -> Tensor | None:
    """Where a tensor of the engine may be read to."""
    return tensor.detach() if in_place and tensor.device.type == "cpu" and tensor.is_contiguous() else None


def _read_weights(source: Source, engine: Engine, in_place: bool) -> dict[str, Tensor]:
    mesh, own = engine.mesh, engine.parameters()
    place = Place(mesh.pp_rank, mesh.tp_rank)
    wanted = (
        replace(source.wanted_weight(name, local_slice(engine.specs[name], mesh), place), into=_home(param, in_place))
        for name, param in own.items()
    )
    return dict(zip(own, source.tensors(wanted), strict=True))


def _read_optimizer(source: Source, engine: Engine, in_place: bool) -> dict[str, OptimizerSlice]:
    """The ranges that this rank's engine owns, filled from the ranges that were stored."""
    mesh = engine.mesh
    place = Place(mesh.pp_rank, mesh.tp_rank)
    plans: dict[str, OptimizerReads] = {}
    slices = engine.optimizer_slices()
    for name, own in slices.items():
        span = FlatRange(local_slice(engine.specs[name], mesh), own.start, own.stop)
        plans[name] = source.optimizer_reads(name, span, place)
    # In fp32 a master may be the weight itself, which is read from its own file and copied before.
    weights = {param.data_ptr() for param in engine.parameters().values()}
    homes = {
        (name, kind): _home(tensor, in_place and tensor.data_ptr() not in weights)
        for name, own in slices.items()
        for kind, tensor in {"master": own.master, **own.moments}.items()
    }
    return read_slices(source, plans, homes)


def read_slices(
    source: Source, plans: Mapping[str, OptimizerReads], homes: Mapping[tuple[str, str], Tensor | None] | None = None
) -> dict[str, OptimizerSlice]:
    """The optimizer slices that `plans` describes, on the CPU.

    homes: (name, "master" or a moment) -> memory to read to, see `TensorRequest`.
    """
    result, into = {}, homes or {}
    tensors = source.tensors(
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


def _hand_over(engine: Engine, manifest: Manifest, found: _Found) -> None:
    engine.load_weights(found.weights)
    if found.optimizer is None:
        engine.refresh_master_from_weights()
    else:
        engine.load_optimizer_slices(found.optimizer)
        engine.load_extra_state(manifest.engine)
    if found.rng is not None:
        restore_rng(found.rng)
    elif found.rng_wanted:
        begin_streams(manifest, engine.settings.seed, engine.mesh)


def read_full_weights(path: str | Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The full weights of a checkpoint of any mesh, on the CPU, in the dtype they were saved in.

    Args:
        path: a `global_step<N>` folder. names: which; None for all.

    Raises:
        CheckpointError: a file is missing or damaged, or a name is unknown; the message names it.
    """
    path = Path(path)
    manifest = read_manifest(path)
    with Source(path, manifest) as source:
        chosen = list(manifest.weights if names is None else names)
        return dict(zip(chosen, source.tensors(source.wanted_weight(name) for name in chosen), strict=True))


def damages(path: str | Path) -> list[str]:
    """Everything that is wrong with a checkpoint, one line each: file, tensor, bytes. Reads every byte of it.

    Where this finds nothing, a resume on any mesh refuses nothing but another model: the manifest goes through the same
    check, and every stored piece is looked up as a rank would read it.
    """
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [f"{MANIFEST}: {error.what}: {error.why or ''}"]
    lines = [line for name, entry in manifest.files.items() for line in damage_of(Path(path) / name, entry)]
    return lines or _unfit(Path(path), manifest)


def _unfit(path: Path, manifest: Manifest) -> list[str]:
    """What does not hold what the manifest says of it, in a checkpoint whose bytes are as they were written."""
    lines = [f"{MANIFEST}: {problem}" for problem in model_problems(manifest)]
    with Source(path, manifest, verify=False) as source:
        for name, entry in manifest.weights.items():
            for part in entry.parts:
                form = (entry.slice_of(part).local_shape, getattr(torch, entry.dtype))
                lines += _misfits(source, part.file, {name: form})
        for name, parts in manifest.optimizer.items():
            for own in parts:
                flat = ((own.range_stop - own.range_start,), torch.float32)
                lines += _misfits(source, own.file, {f"{kind}/{name}": flat for kind in (MASTER, *own.moments)})
        for file in manifest.files:
            try:
                if file.startswith(RNG):
                    check_rng(source.whole_file(file))
            except CheckpointError as error:
                lines.append(f"{file}: {error.what}" + (f": {error.why}" if error.why else ""))
    return lines


def _misfits(source: Source, file: str, forms: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> list[str]:
    lines = []
    for key, expected in forms.items():
        try:
            there = source.reader(file).form(key)
            if there != expected:
                lines.append(
                    f"{file}: '{key}' is {list(there[0])} {there[1]}, the manifest says {list(expected[0])} {expected[1]}"
                )
        except CheckpointError as error:
            lines.append(f"{file}: {error.what}: {error.why or key}")
    return lines


def verify_checkpoint(path: str | Path) -> Manifest:
    """Check every file of a checkpoint against its manifest, which is returned; damage raises DamagedCheckpoint."""
    manifest, found = read_manifest(path), damages(path)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise DamagedCheckpoint("the checkpoint is damaged", where=str(path), why=found[0] + more)
    return manifest
