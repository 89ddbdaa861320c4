"""Which checkpoint a run starts from.

A wrong `load` is an error here; in NeoX a typo in it silently starts a fresh training.
"""

from __future__ import annotations

from pathlib import Path

from megatron.checkpoint.layout import LATEST, MANIFEST, contents, iteration_of, side_folders, tag_of, whole_steps
from megatron.errors import CheckpointError


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
    raise CheckpointError(f"no checkpoint of step {step}, which {asked} asks for", where=str(path), why=why)


def _latest(folder: Path) -> int | None:
    """The step that `latest` names; without that file (killed before it was first written) the newest step."""
    file = folder / LATEST
    if not file.is_file():
        steps = [*whole_steps(folder), *(s for s, p in side_folders(folder, "old") if (p / MANIFEST).is_file())]
        return max(steps, default=None)
    try:
        tag = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError("cannot read `latest`", where=str(file), why=str(error)) from error
    step = iteration_of(tag)
    if step is None:
        raise CheckpointError(
            "`latest` does not name a checkpoint",
            where=str(file),
            why=f"it says {tag[:60]!r}, expected global_step<N>",
            hint=f"write one of the tags into it, or set `iteration`; {contents(folder)}",
        )
    return step


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
    if save_dir is not None and nothing_yet and Path(save_dir).resolve() == folder.resolve():
        return None
    raise CheckpointError(
        "no checkpoint to load",
        where=f"load: {load_dir}",
        why=contents(folder),
        hint="correct `load`, or leave it out to start from nothing",
    )
