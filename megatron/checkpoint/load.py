"""Loading: choose what this rank needs from the manifest, verify those files, and hand it to the engine.

Weights are read on any mesh: the slice that a rank wants is filled from whatever slices were stored. Optimizer state
and random numbers go back to the mesh they were saved on. All ranks verify before any of them changes its engine,
and one rank's damaged file is an error on all.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.checkpoint.agree import Verdict
from megatron.checkpoint.layout import rng_file
from megatron.checkpoint.manifest import Manifest, read_manifest
from megatron.checkpoint.shards import MASTER, local_slice
from megatron.checkpoint.source import Source
from megatron.checkpoint.tensors import check_file
from megatron.engine.base import Engine, OptimizerSlice
from megatron.errors import CheckpointError
from megatron.parallel.mesh import Mesh
from megatron.parallel.random import restore_rng

_log = logging.getLogger(__name__)
_FREE_FIELDS = frozenset({"hidden_dropout", "init_method", "output_init_method", "init_std"})  # not the maths of the weights


def load_checkpoint(
    path: str | Path,
    engine: Engine,
    *,
    model_config: Mapping[str, Any] | None = None,
    load_optimizer: bool = True,
    load_rng: bool = True,
    finetune: bool = False,
) -> dict[str, Any]:
    """Load a checkpoint into a running engine; every rank must call this.

    Args:
        path: the folder that `find_checkpoint` gave.
        model_config: this run's model; compared with the saved one when given.
        load_optimizer: False (no_load_optim) keeps the step but starts the moments at zero.
        load_rng: False (no_load_rng) keeps this run's random numbers.
        finetune: weights only; no optimizer, no random numbers, and an empty state (step 0).

    Returns:
        The training state as it was saved; empty for `finetune`.

    Raises:
        CheckpointError: on all ranks: a missing or damaged file, another model, another mesh for optimizer state.
    """
    path = Path(path)
    wanted = _Wanted(load_optimizer and not finetune, load_rng and not finetune)
    verdict = Verdict("the checkpoint could not be loaded", str(path))
    with verdict.watch():
        manifest = read_manifest(path)
        _check(path, manifest, engine, model_config, wanted.optimizer)
        found = _read(path, manifest, engine, wanted)
    verdict.settle()
    with verdict.watch():
        _hand_over(engine, manifest, found)
    verdict.settle()
    return {} if finetune else dict(manifest.state)


@dataclass(frozen=True)
class _Wanted:
    optimizer: bool
    rng: bool


@dataclass(frozen=True)
class _Found:
    """What was read for one rank; None where it was not wanted or is not there."""

    weights: dict[str, Tensor]
    optimizer: dict[str, OptimizerSlice] | None
    rng: dict[str, Tensor] | None


def _check(path: Path, manifest: Manifest, engine: Engine, model_config: Mapping[str, Any] | None, optimizer: bool) -> None:
    if model_config is not None:
        allowed = check_model(path, manifest, model_config)
        if engine.mesh.rank == 0 and allowed:
            _log.warning("differs from the checkpoint: %s", "; ".join(allowed))
    check_names(path, manifest, set(engine.specs))
    if optimizer:
        _check_optimizer(path, manifest, engine.mesh)


def _read(path: Path, manifest: Manifest, engine: Engine, wanted: _Wanted) -> _Found:
    """Read this rank's tensors; nothing of the engine is touched yet."""
    with Source(path, manifest) as source:
        weights = _read_weights(source, engine)
        optimizer = _read_optimizer(source, engine) if wanted.optimizer else None
        rng = source.whole_file(rng_file(engine.mesh.rank)) if wanted.rng and _rng_fits(path, manifest, engine.mesh) else None
    return _Found(weights, optimizer, rng)


def _read_weights(source: Source, engine: Engine) -> dict[str, Tensor]:
    mesh = engine.mesh
    return {name: source.weight(name, local_slice(engine.specs[name], mesh), mesh.tp_rank) for name in engine.weights()}


def _read_optimizer(source: Source, engine: Engine) -> dict[str, OptimizerSlice]:
    """The ranges that this rank's engine owns, filled from the ranges that were stored."""
    mesh, result = engine.mesh, {}
    for name, own in engine.optimizer_slices().items():
        part = local_slice(engine.specs[name], mesh)
        parts = source.optimizer_parts(name, part, mesh.pp_rank, mesh.tp_rank)
        moments = {m: source.flat(parts, f"{m}/{name}", own.start, own.stop) for m in parts[0].moments}
        master = source.flat(parts, f"{MASTER}/{name}", own.start, own.stop)
        result[name] = OptimizerSlice(own.start, own.stop, master, moments, parts[0].step)
    return result


def _hand_over(engine: Engine, manifest: Manifest, found: _Found) -> None:
    engine.load_weights(found.weights)
    if found.optimizer is None:
        engine.refresh_master_from_weights()
    else:
        engine.load_optimizer_slices(found.optimizer)
        engine.load_extra_state(manifest.engine)
    if found.rng is not None:
        restore_rng(found.rng)


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
        return {name: source.weight(name) for name in (manifest.weights if names is None else names)}


def verify_checkpoint(path: str | Path) -> Manifest:
    """Check every file of a checkpoint against its manifest, which is returned; damage raises CheckpointError."""
    manifest = read_manifest(path)
    for name, entry in manifest.files.items():
        check_file(Path(path) / name, entry)
    return manifest


def check_names(path: Path, manifest: Manifest, specs: set[str]) -> None:
    """Raise CheckpointError unless the checkpoint holds exactly this model's parameters."""
    saved = set(manifest.weights)
    if saved == specs:
        return
    missing, extra = sorted(specs - saved), sorted(saved - specs)
    raise CheckpointError(
        "the checkpoint holds other parameters than this model",
        where=str(path),
        why=f"{len(missing)} are missing{_few(missing)}, {len(extra)} are unknown{_few(extra)}",
        hint="compare the model section of the config with the one in manifest.json",
    )


def _few(names: list[str]) -> str:
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""


def check_model(path: Path, manifest: Manifest, model_config: Mapping[str, Any]) -> list[str]:
    """Compare this run's model with the saved one.

    Returns:
        The differences that are allowed (dropout, initialisation), for the log.

    Raises:
        CheckpointError: the models differ in anything else; the message names the fields.
    """
    differing = _differences(dict(manifest.model_config), json.loads(json.dumps(dict(model_config))))
    hard = [text for name, text in differing.items() if name not in _FREE_FIELDS]
    if hard:
        raise CheckpointError(
            "the checkpoint is of another model",
            where=str(path),
            why="; ".join(hard[:6]) + (f"; and {len(hard) - 6} more" if len(hard) > 6 else ""),
            hint="take the model section of the config that the checkpoint was trained with (it lies in configs/)",
        )
    return list(differing.values())


def _differences(saved: Any, own: Any, name: str = "") -> dict[str, str]:
    """Dotted field -> what is saved and what this run has, for every leaf that differs."""
    if isinstance(saved, dict) and isinstance(own, dict):
        found: dict[str, str] = {}
        for key in [*saved, *(k for k in own if k not in saved)]:
            found |= _differences(saved.get(key), own.get(key), f"{name}.{key}" if name else str(key))
        return found
    return {} if saved == own else {name: f"{name} is {_short(saved)} in the checkpoint, {_short(own)} here"}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _same_mesh(manifest: Manifest, mesh: Mesh) -> bool:
    return dict(manifest.mesh) == {"pp": mesh.pp, "dp": mesh.dp, "tp": mesh.tp}


def _mesh_text(manifest: Manifest, mesh: Mesh) -> str:
    saved = " x ".join(f"{axis} {size}" for axis, size in manifest.mesh.items())
    return f"saved on {saved}, this run is pp {mesh.pp} x dp {mesh.dp} x tp {mesh.tp}"


def _check_optimizer(path: Path, manifest: Manifest, mesh: Mesh) -> None:
    if not manifest.optimizer:
        raise CheckpointError(
            "the checkpoint holds no optimizer state",
            where=str(path),
            hint="set no_load_optim or finetune to start without",
        )
    if not _same_mesh(manifest, mesh):
        raise CheckpointError(
            "optimizer state goes back to the mesh it was saved on",
            where=str(path),
            why=_mesh_text(manifest, mesh),
            hint="use the same mesh, or set no_load_optim or finetune: weights load on any mesh",
        )


def _rng_fits(path: Path, manifest: Manifest, mesh: Mesh) -> bool:
    """Whether random numbers can be restored; says in the log why not."""
    why = "" if _same_mesh(manifest, mesh) else _mesh_text(manifest, mesh)
    if rng_file(mesh.rank) not in manifest.files:
        why = why or "they were not saved (no_save_rng)"
    if why and mesh.rank == 0:
        _log.warning("random numbers are not restored from %s: %s", path, why)
    return not why
