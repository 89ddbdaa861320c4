"""Resume: load the newest complete checkpoint; if it is damaged, all ranks fall back to the next older one.

Rank 0 lists the candidates and sends them to the others, so that a file system that lags on one node cannot split the ranks.
Each rank verifies what it reads; if any finds damage, all try the next candidate. Skipped checkpoints are logged with causes.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron.checkpoint.collective_errors import CollectiveError, exchange
from megatron.checkpoint.find import Candidates, candidates
from megatron.checkpoint.load import LoadOptions, load_checkpoint
from megatron.checkpoint.manifest import Manifest, read_manifest
from megatron.engine.base import Engine
from megatron.errors import CheckpointError, DamagedCheckpoint

_log = logging.getLogger(__name__)


STARTED_FROM = "started_from"
"""Metadata of a checkpoint whose run started from another run's checkpoint: that folder, or `HERE`."""
HERE = "."
"""The save folder itself (`finetune` with `load` and `save` the same)."""


@dataclass(frozen=True)
class Resumed:
    """What a resume has loaded.

    Attributes:
        path: the checkpoint; None for a fresh start.
        state: the training state as saved; empty for a fresh start.
        skipped: one line per checkpoint that could not be used.
        facts: metadata from its manifest.
        is_continuation: the run continues the checkpoint's; False when it only starts from its weights (`finetune`).
    """

    path: Path | None
    state: dict[str, Any]
    skipped: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    is_continuation: bool = False


def resume(
    load_dir: str | Path,
    engine: Engine,
    options: LoadOptions | None = None,
    *,
    iteration: int | None = None,
    save_dir: str | Path | None = None,
) -> Resumed:
    """Find and load a checkpoint; every rank calls this with the same arguments.

    A run that starts from another folder's weights, or with `finetune`, does so once. When `save_dir` holds checkpoints that
    it has written since, it resumes from the newest of them, whatever `iteration`, `finetune` and `no_load_optim` say about
    its start.

    Args:
        load_dir: as `find_checkpoint`; a `global_step<N>` folder leaves no fallback.
        engine: the engine to load into.
        options: of `load_checkpoint`; None is `LoadOptions()`.
        iteration: as `find_checkpoint`; leaves no fallback.
        save_dir: where this run saves.

    Raises:
        CheckpointError: there is no checkpoint, none is complete, or it is of another model.
    """
    options, rank, own = options or LoadOptions(), engine.mesh.rank, Candidates((), (), False)
    if starts_elsewhere(load_dir, save_dir, options.finetune):
        assert save_dir is not None
        own = _from_rank_0(lambda: _own(load_dir, save_dir), save_dir, rank)
    if own.paths:
        load_dir, listed = save_dir or load_dir, own
        options = replace(options, load_optimizer=True, load_rng=True, finetune=False)
    else:
        listed = _from_rank_0(lambda: candidates(load_dir, iteration, save_dir), load_dir, rank)
    skipped, facts = list(listed.notes), dict[str, Any]()

    def remember_facts(manifest: Manifest) -> None:
        facts.clear()
        facts.update(manifest.facts)

    for path in listed.paths:
        try:
            state = load_checkpoint(path, engine, options, on_manifest=remember_facts)
        except DamagedCheckpoint as error:
            if listed.explicit:
                raise
            skipped.append(_line(path, error))
            continue
        if skipped and rank == 0:
            _log.warning("resuming from %s, skipped: %s", path, "; ".join(skipped))
        if own.paths and rank == 0:
            _log.info("resuming from %s, which this run has saved since it started from %s", path, facts.get(STARTED_FROM))
        elif options.finetune and rank == 0:
            _log.info("starting from the weights of %s; optimizer, step and data position begin again", path)
        return Resumed(path, state, tuple(skipped), facts, not options.finetune)
    if not skipped:
        return Resumed(None, {})
    raise CheckpointError(
        "no checkpoint can be used",
        where=str(load_dir),
        why="; ".join(skipped),
        hint="restore one of them from a copy, or remove them to start from scratch",
    )


def starts_elsewhere(load_dir: str | Path, save_dir: str | Path | None, finetune: bool) -> bool:
    """Whether a run only starts from what `load_dir` holds, and saves to another folder or as another run."""
    return save_dir is not None and (finetune or not _same_folder(load_dir, save_dir))


def _same_folder(load_dir: str | Path, save_dir: str | Path) -> bool:
    """Whether `load_dir` is the save folder, or a checkpoint in it."""
    load, save = os.path.realpath(load_dir), os.path.realpath(save_dir)
    return save in (load, os.path.dirname(load))


def origin(load_dir: str | Path | None, save_dir: str | Path | None, finetune: bool) -> dict[str, str]:
    """Metadata that tells the checkpoints which such a run saves from those it started with; empty for any other run."""
    if load_dir is None or save_dir is None or not starts_elsewhere(load_dir, save_dir, finetune):
        return {}
    return {STARTED_FROM: HERE if _same_folder(load_dir, save_dir) else str(load_dir)}


def _own(load_dir: str | Path, save_dir: str | Path) -> Candidates:
    """The checkpoints in `save_dir` that a run started from `load_dir` wrote itself, best first.

    A checkpoint with an unreadable manifest may be its own, unless the run started from this very folder.

    Raises:
        CheckpointError: they belong to a run that started from another folder.
    """
    saved, here = candidates(save_dir, None, save_dir), _same_folder(load_dir, save_dir)
    origins = {path: _origin_of(path, here) for path in saved.paths}
    own = tuple(path for path, start in origins.items() if start is not None and (start == HERE) == here)
    others = [path.name for path in saved.paths if path not in own]
    if others and not own and not here:
        _log.warning(
            "%s holds %s of another run; this run, started from %s, saves there too", save_dir, ", ".join(others), load_dir
        )
    start = next((text for path in own if (text := origins[path])), None)
    if start and not here and Path(start).exists() and not _same_folder(load_dir, start) and not _same_folder(start, load_dir):
        raise CheckpointError(
            "`save` holds the checkpoints of a run that started from another folder",
            where=str(own[0]),
            why=f"it started from {start}, and load is {load_dir}",
            hint="give this run its own `save`; to continue the other run, set `load` as it was, or to `save`",
        )
    return Candidates(own, saved.notes, False)


def _origin_of(path: Path, here: bool) -> str | None:
    """Where a checkpoint's run started: None if it did not start elsewhere, empty if its manifest cannot be read."""
    try:
        start = read_manifest(path).facts.get(STARTED_FROM)
    except DamagedCheckpoint:
        return None if here else ""
    return None if start is None else str(start)


def _line(path: Path, error: CheckpointError) -> str:
    where = "" if error.where in (None, str(path)) else f" {error.where}"
    return f"{path.name}: {error.what}{where}" + (f", {error.why}" if error.why else "")


def _from_rank_0(find: Callable[[], Candidates], where: str | Path, rank: int) -> Candidates:
    """Rank 0's candidates, on every rank."""
    errors, listed = CollectiveError("the checkpoints could not be listed", str(where)), Candidates((), (), False)
    with errors.capture():
        if rank == 0:
            listed = find()
    errors.raise_on_all_ranks()
    body = json.loads(exchange(json.dumps([[str(p) for p in listed.paths], list(listed.notes), listed.explicit]))[0])
    return Candidates(tuple(map(Path, body[0])), tuple(body[1]), body[2])
