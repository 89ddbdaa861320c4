"""Which checkpoint a run starts from.

A wrong `load` is an error here; in NeoX a typo in it silently starts a fresh training.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from megatron.checkpoint.damage import DamagedCheckpoint
from megatron.checkpoint.layout import (
    LATEST,
    MANIFEST,
    contents,
    iteration_of,
    side_folders,
    step_folders,
    tag_of,
    whole_steps,
)
from megatron.checkpoint.manifest import read_manifest
from megatron.errors import CheckpointError
from megatron.files import read_text

_LONGEST_TAG = 4096  # bytes of `latest`


def _set_aside(folder: Path, step: int) -> Path | None:
    """The whole copy of a step whose overwriting was interrupted between two renames."""
    for number, path in side_folders(folder, "old"):
        if number == step and (path / MANIFEST).is_file():
            return path
    return None


def _step(folder: Path, step: int, asked: str) -> Path:
    path = folder / tag_of(step)
    if (path / MANIFEST).is_file():
        return path
    aside = _set_aside(folder, step)
    if aside is not None and not path.exists():
        return aside
    why = "its manifest.json is missing" if path.is_dir() else contents(folder)
    if path.is_dir() and any(path.glob("*_states.pt")):
        why = "it is a GPT-NeoX/DeepSpeed checkpoint, which must be imported first"
    raise DamagedCheckpoint(f"no checkpoint of step {step}, which {asked} asks for", where=str(path), why=why)


def _latest(folder: Path) -> int | None:
    """The step that `latest` names; without that file (killed before it was first written) the newest step."""
    file = folder / LATEST
    if not os.path.lexists(file):
        steps = [*whole_steps(folder), *(s for s, p in side_folders(folder, "old") if (p / MANIFEST).is_file())]
        return max(steps, default=None)
    try:
        tag = read_text(file, _LONGEST_TAG).strip()
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint("cannot read `latest`", where=str(file), why=str(error)) from error
    step = iteration_of(tag)
    if step is None:
        raise DamagedCheckpoint(
            "`latest` does not name a checkpoint",
            where=str(file),
            why=f"it says {tag[:60]!r}, expected global_step<N>",
            hint=f"write one of the tags into it, or set `iteration`; {contents(folder)}",
        )
    return step


def latest_problem(folder: Path) -> str:
    """What is wrong with the `latest` of a save folder; empty when it names a folder that is there, or is not there itself."""
    try:
        step = _latest(folder)
    except DamagedCheckpoint as error:
        return f"{error.what}: {error.why}"
    if not os.path.lexists(folder / LATEST) or step is None or (folder / tag_of(step)).is_dir():
        return ""
    return "" if _set_aside(folder, step) else f"it names {tag_of(step)}, which does not exist"


def find_checkpoint(load_dir: str | Path, iteration: int | None = None, save_dir: str | Path | None = None) -> Path | None:
    """The checkpoint folder to load.

    Args:
        load_dir: a save folder, or one `global_step<N>` folder itself.
        iteration: the step wanted; None takes what `latest` says.
        save_dir: where this run saves. Equal to `load_dir` and without any checkpoint yet, the run starts at zero.

    Returns:
        The folder, or None for a fresh start.

    Raises:
        CheckpointError: there is no such checkpoint; the message lists what is there.
    """
    folder = Path(load_dir)
    if (folder / MANIFEST).is_file() and iteration is None:
        return folder
    if iteration is not None:
        return _step(folder, iteration, "`iteration`")
    step = _latest(folder) if folder.is_dir() else None
    if step is not None:
        return _step(folder, step, "`latest`")
    nothing_yet = not folder.exists() or folder.is_dir()
    if save_dir is not None and nothing_yet and os.path.realpath(save_dir) == os.path.realpath(folder):
        return None
    raise CheckpointError(
        "no checkpoint to load",
        where=f"load: {load_dir}",
        why=contents(folder),
        hint="correct `load`, or leave it out to start from nothing",
    )


def place_of(path: str | Path) -> Path:
    """What a person means by a path: a checkpoint or a save folder is itself, a run folder its `checkpoints/`."""
    folder = Path(path)
    named = iteration_of(folder.name) is not None or (folder / MANIFEST).is_file() or (folder / LATEST).is_file()
    inner = folder / "checkpoints"
    return inner if not named and not step_folders(folder) and inner.is_dir() else folder


def newest_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a command is to use: `path` itself, or the newest (as `latest` says) of a save or run folder.

    Raises:
        CheckpointError: there is none; the message says what lies there.
    """
    folder = place_of(path)
    if iteration_of(folder.name) is not None or (folder / MANIFEST).is_file():
        return folder
    if not folder.is_dir() or _latest(folder) is None:
        raise no_checkpoint(folder)
    found = find_checkpoint(folder)
    assert found is not None  # without a save folder to compare with, a missing checkpoint is an error
    return found


def refuse_to_mix(folder: str | Path, iteration: int) -> None:
    """Refuse to import beside the checkpoints of a run, whose newest the import would become; an import may be made again.

    Args:
        folder: the save folder to import into. iteration: the step that the import gets.

    Raises:
        CheckpointError: it holds other checkpoints.
    """
    there = step_folders(Path(folder))
    if not there or (set(there) == {iteration} and _is_import(there[iteration])):
        return
    raise CheckpointError(
        "the output folder holds checkpoints already",
        where=str(folder),
        why=f"{contents(Path(folder))}; a run that goes on there would take step {iteration} for one of its own",
        hint="--output: a folder that is new or empty",
    )


def _is_import(checkpoint: Path) -> bool:
    try:
        return "imported_from" in read_manifest(checkpoint).facts
    except CheckpointError:
        return False


def no_checkpoint(folder: Path) -> CheckpointError:
    """The error of a command that was given a folder without any checkpoint."""
    hint = "RUN/checkpoints takes the newest of a run, RUN/checkpoints/global_step<N> that one"
    if not step_folders(folder) and any(folder.glob("*.safetensors")) and (folder / "config.json").is_file():
        hint = "this is a Hugging Face folder; tools/convert_from_hf.py makes a checkpoint of it"
    return CheckpointError("this is not a checkpoint, and holds none", where=str(folder), why=contents(folder), hint=hint)


@dataclass(frozen=True)
class Candidates:
    """Checkpoints to try, the best first. notes: what was left out already and why. explicit: there is no second choice."""

    paths: tuple[Path, ...]
    notes: tuple[str, ...]
    explicit: bool


def candidates(load_dir: str | Path, iteration: int | None = None, save_dir: str | Path | None = None) -> Candidates:
    """The checkpoints that a resume may try, in order; arguments as `find_checkpoint`.

    First what `latest` says, then the older ones, newest first, then newer ones (of a run that was wound back, or whose
    last rename was the last thing that happened). Without a readable `latest`: the newest first.

    Raises:
        CheckpointError: as `find_checkpoint`, when nothing in the folder looks like a checkpoint.
    """
    folder = Path(load_dir)
    if iteration is not None or (folder / MANIFEST).is_file() or not folder.is_dir():
        path = find_checkpoint(load_dir, iteration, save_dir)
        return Candidates(() if path is None else (path,), (), True)
    notes, first = [], None
    try:
        first = _latest(folder)
    except DamagedCheckpoint as error:
        notes.append(f"{error.what}, {error.why}")
    whole = {s: p for s, p in side_folders(folder, "old") if (p / MANIFEST).is_file()} | whole_steps(folder)
    notes += [f"{p.name}: its manifest.json is missing" for s, p in step_folders(folder).items() if s not in whole]
    if first is not None and first not in whole and not (folder / tag_of(first)).is_dir():
        notes.append(f"{tag_of(first)}: `latest` names it, it does not exist")
    if not whole and (not notes or any(folder.glob("*/*_states.pt"))):
        path = find_checkpoint(load_dir, None, save_dir)
        return Candidates(() if path is None else (path,), (), True)
    first = max(whole, default=0) if first is None else first
    order = sorted((s for s in whole if s <= first), reverse=True) + sorted(s for s in whole if s > first)
    return Candidates(tuple(whole[step] for step in order), tuple(notes), False)
