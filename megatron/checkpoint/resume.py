"""Resume: load the newest whole checkpoint, and step back to an older one, on all ranks alike, when it is damaged.

Rank 0 lists the candidates and tells the others, so that a file system that lags on one node cannot split the ranks. Each
rank verifies what it reads; if any finds damage all go to the next candidate. What was skipped is said with its cause.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.checkpoint.collective_errors import CollectiveError, exchange
from megatron.checkpoint.damage import DamagedCheckpoint
from megatron.checkpoint.find import Candidates, candidates
from megatron.checkpoint.load import load_checkpoint
from megatron.checkpoint.manifest import Manifest, read_manifest
from megatron.engine.base import Engine
from megatron.errors import CheckpointError

_log = logging.getLogger(__name__)


STARTED_FROM = "started_from"
"""Fact of a checkpoint whose run began with what another run had saved: the folder, or `HERE`."""
HERE = "."
"""The save folder itself (`finetune` with `load` and `save` the same)."""


@dataclass(frozen=True)
class Resumed:
    """path: what was loaded, None for a fresh start. state: as saved, empty then. skipped: one line per checkpoint.

    facts: of its manifest. goes_on: the state is the run's own, not only a start for it (`finetune`).
    """

    path: Path | None
    state: dict[str, Any]
    skipped: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    goes_on: bool = False


def resume(
    load_dir: str | Path,
    engine: Engine,
    *,
    iteration: int | None = None,
    save_dir: str | Path | None = None,
    finetune: bool = False,
    **options: Any,
) -> Resumed:
    """Find and load a checkpoint; every rank calls this with the same arguments.

    A run that starts with the weights of another folder, or with `finetune`, does so once: when `save_dir` holds checkpoints
    that it has written since, it goes on from the newest of them, whatever `iteration`, `finetune` and `no_load_optim` say of
    its start.

    Args:
        load_dir, iteration, save_dir: as `find_checkpoint`. With `iteration`, or a `global_step<N>` folder as `load_dir`,
            that one is loaded or nothing.
        finetune, options: of `load_checkpoint`.

    Raises:
        CheckpointError: there is none, none is whole, or it is of another model.
    """
    rank, own = engine.mesh.rank, Candidates((), (), False)
    if starts_elsewhere(load_dir, save_dir, finetune):
        assert save_dir is not None
        own = _agreed(lambda: _own(load_dir, save_dir), save_dir, rank)
    if own.paths:
        load_dir, chosen = save_dir or load_dir, own
        options, finetune = {**options, "load_optimizer": True, "load_rng": True}, False
    else:
        chosen = _agreed(lambda: candidates(load_dir, iteration, save_dir), load_dir, rank)
    skipped, facts = list(chosen.notes), dict[str, Any]()

    def look(manifest: Manifest) -> None:
        facts.clear()
        facts.update(manifest.facts)

    for path in chosen.paths:
        try:
            state = load_checkpoint(path, engine, finetune=finetune, look=look, **options)
        except DamagedCheckpoint as error:
            if chosen.explicit:
                raise
            skipped.append(_line(path, error))
            continue
        if skipped and rank == 0:
            _log.warning("resuming from %s, skipped: %s", path, "; ".join(skipped))
        if own.paths and rank == 0:
            _log.info("going on from %s, which this run has saved since it started from %s", path, facts.get(STARTED_FROM))
        elif finetune and rank == 0:
            _log.info("starting from the weights of %s; optimizer, step and place in the data begin again", path)
        return Resumed(path, state, tuple(skipped), facts, not finetune)
    if not skipped:
        return Resumed(None, {})
    raise CheckpointError(
        "no checkpoint can be used",
        where=str(load_dir),
        why="; ".join(skipped),
        hint="restore one of them from a copy, or remove them to start from nothing",
    )


def starts_elsewhere(load_dir: str | Path, save_dir: str | Path | None, finetune: bool) -> bool:
    """Does a run only begin with what `load_dir` holds, and save to another place or as another run?"""
    return save_dir is not None and (finetune or not _same_place(load_dir, save_dir))


def _same_place(load_dir: str | Path, save_dir: str | Path) -> bool:
    """Is `load_dir` the save folder, or a checkpoint in it?"""
    load, save = os.path.realpath(load_dir), os.path.realpath(save_dir)
    return save in (load, os.path.dirname(load))


def origin(load_dir: str | Path | None, save_dir: str | Path | None, finetune: bool) -> dict[str, str]:
    """The fact that tells checkpoints which such a run saves from those that it started with; empty for any other run."""
    if load_dir is None or save_dir is None or not starts_elsewhere(load_dir, save_dir, finetune):
        return {}
    return {STARTED_FROM: HERE if _same_place(load_dir, save_dir) else str(load_dir)}


def _own(load_dir: str | Path, save_dir: str | Path) -> Candidates:
    """The checkpoints in `save_dir` that a run which started with `load_dir` wrote itself, the best first.

    One whose manifest cannot be read may be its own, unless the run started from this very folder.

    Raises:
        CheckpointError: they are of a run that started from elsewhere.
    """
    found, here = candidates(save_dir, None, save_dir), _same_place(load_dir, save_dir)
    origins = {path: _origin_of(path, here) for path in found.paths}
    own = tuple(path for path, told in origins.items() if told is not None and (told == HERE) == here)
    others = [path.name for path in found.paths if path not in own]
    if others and not own and not here:
        _log.warning(
            "%s holds %s of another run, among which this one, from %s, will save", save_dir, ", ".join(others), load_dir
        )
    told = next((text for path in own if (text := origins[path])), None)
    if told and not here and Path(told).exists() and not _same_place(load_dir, told) and not _same_place(told, load_dir):
        raise CheckpointError(
            "`save` holds the checkpoints of a run that started from another folder",
            where=str(own[0]),
            why=f"it started from {told}, and load is {load_dir}",
            hint="give this run a `save` of its own; to go on with the other, set `load` as it was, or to `save`",
        )
    return Candidates(own, found.notes, False)


def _origin_of(path: Path, here: bool) -> str | None:
    """Where the run of a checkpoint started, None for a run that did not start elsewhere, empty where nobody can tell."""
    try:
        told = read_manifest(path).facts.get(STARTED_FROM)
    except DamagedCheckpoint:
        return None if here else ""
    return None if told is None else str(told)


def _line(path: Path, error: CheckpointError) -> str:
    where = "" if error.where in (None, str(path)) else f" {error.where}"
    return f"{path.name}: {error.what}{where}" + (f", {error.why}" if error.why else "")


def _agreed(find: Callable[[], Candidates], where: str | Path, rank: int) -> Candidates:
    """Rank 0's candidates, on every rank."""
    verdict, found = CollectiveError("the checkpoints could not be listed", str(where)), Candidates((), (), False)
    with verdict.capture():
        if rank == 0:
            found = find()
    verdict.raise_on_all_ranks()
    body = json.loads(exchange(json.dumps([[str(p) for p in found.paths], list(found.notes), found.explicit]))[0])
    return Candidates(tuple(map(Path, body[0])), tuple(body[1]), body[2])
