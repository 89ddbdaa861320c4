"""Resume: load the newest whole checkpoint, and step back to an older one, on all ranks alike, when it is damaged.

Rank 0 lists the candidates and tells the others, so that a file system that lags on one node cannot split the ranks. Each
rank verifies what it reads; if any finds damage all go to the next candidate. What was skipped is said with its cause.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.checkpoint.agree import Verdict, exchange
from megatron.checkpoint.damage import DamagedCheckpoint
from megatron.checkpoint.find import Candidates, candidates
from megatron.checkpoint.load import load_checkpoint
from megatron.engine.base import Engine
from megatron.errors import CheckpointError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resumed:
    """path: what was loaded, None for a fresh start. state: as saved, empty then. skipped: one line per checkpoint."""

    path: Path | None
    state: dict[str, Any]
    skipped: tuple[str, ...] = ()


def resume(
    load_dir: str | Path,
    engine: Engine,
    *,
    iteration: int | None = None,
    save_dir: str | Path | None = None,
    **options: Any,
) -> Resumed:
    """Find and load a checkpoint; every rank calls this with the same arguments.

    Args:
        load_dir, iteration, save_dir: as `find_checkpoint`. With `iteration`, or a `global_step<N>` folder as `load_dir`,
            that one is loaded or nothing.
        options: of `load_checkpoint`.

    Raises:
        CheckpointError: there is none, none is whole, or it is of another model.
    """
    chosen = _agreed(load_dir, iteration, save_dir, engine.mesh.rank)
    skipped = list(chosen.notes)
    for path in chosen.paths:
        try:
            state = load_checkpoint(path, engine, **options)
        except DamagedCheckpoint as error:
            if chosen.explicit:
                raise
            skipped.append(_line(path, error))
            continue
        if skipped and engine.mesh.rank == 0:
            _log.warning("resuming from %s, skipped: %s", path, "; ".join(skipped))
        return Resumed(path, state, tuple(skipped))
    if not skipped:
        return Resumed(None, {})
    raise CheckpointError(
        "no checkpoint can be used",
        where=str(load_dir),
        why="; ".join(skipped),
        hint="restore one of them from a copy, or remove them to start from nothing",
    )


def _line(path: Path, error: CheckpointError) -> str:
    where = "" if error.where in (None, str(path)) else f" {error.where}"
    return f"{path.name}: {error.what}{where}" + (f", {error.why}" if error.why else "")


def _agreed(load_dir: str | Path, iteration: int | None, save_dir: str | Path | None, rank: int) -> Candidates:
    """Rank 0's candidates, on every rank."""
    verdict, found = Verdict("the checkpoints could not be listed", str(load_dir)), Candidates((), (), False)
    with verdict.watch():
        if rank == 0:
            found = candidates(load_dir, iteration, save_dir)
    verdict.settle()
    body = json.loads(exchange(json.dumps([[str(p) for p in found.paths], list(found.notes), found.explicit]))[0])
    return Candidates(tuple(map(Path, body[0])), tuple(body[1]), body[2])
