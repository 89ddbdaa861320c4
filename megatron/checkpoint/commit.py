"""From a temporary folder to a checkpoint: the few renames whose order makes a kill at any moment harmless.

    1  global_step<N>.tmp-<id> is filled and synced, its manifest last
    2  a global_step<N> that exists already is renamed to .old-<id>
    3  the temporary folder is renamed to global_step<N>; the save folder is synced
    4  `latest` is replaced
    5  the .old-<id> folder is deleted

Between 2 and 3 the only whole copy of step N has the name .old-<id>; `recover` (at the next save) and `find_checkpoint`
(at a load) both know that. Only rank 0 runs the functions of this file.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from pathlib import Path

from megatron.checkpoint.layout import LATEST, MANIFEST, side_folders, step_folders, tag_of
from megatron.errors import CheckpointError
from megatron.files import fsync_folder, write_text


def new_save_id() -> str:
    """A short text that no other save has; it names the temporary folder and stands in every shard."""
    return uuid.uuid4().hex[:12]


def temporary_folder(folder: Path, iteration: int, save_id: str) -> Path:
    """Where a save is assembled."""
    return folder / f"{tag_of(iteration)}.tmp-{save_id}"


def recover(folder: Path) -> list[str]:
    """Clear what an interrupted save left in `folder`; a step that was set aside and not replaced gets its name back.

    Returns:
        The names that were removed or renamed, for the log.
    """
    done = []
    steps = step_folders(folder)
    for step, path in side_folders(folder, "old"):
        if step not in steps and (path / MANIFEST).is_file():
            os.rename(path, folder / tag_of(step))
            steps = step_folders(folder)
        else:
            shutil.rmtree(path)
        done.append(path.name)
    for kind in ("tmp", "trash"):
        for _, path in side_folders(folder, kind):
            shutil.rmtree(path)
            done.append(path.name)
    if done:
        fsync_folder(folder)
    return done


def check_space(folder: Path, needed: int) -> None:
    """Refuse a save that cannot fit, before anything is written.

    Args:
        folder: the save folder. needed: bytes that all ranks together will write.

    Raises:
        CheckpointError: less than `needed` plus one per cent is free.
    """
    free = shutil.disk_usage(folder).free
    needed += needed // 100 + (1 << 20)
    if free < needed:
        raise CheckpointError(
            "not enough free space for a checkpoint",
            where=str(folder),
            why=f"it needs {needed / 2**30:.3f} GiB, {free / 2**30:.3f} GiB are free",
            hint="free some space, or set keep_last_n_checkpoints",
        )


def sync_tree(folder: Path) -> None:
    """Make the names in `folder` and in its subfolders durable; the files in them are synced when they are written."""
    for child in sorted(folder.iterdir()):
        if child.is_dir():
            sync_tree(child)
    fsync_folder(folder)


def publish(temporary: Path, iteration: int) -> Path:
    """Give a filled temporary folder its final name and point `latest` at it.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: a rename or a sync failed; what was whole before is whole still.
    """
    folder = temporary.parent
    final = folder / tag_of(iteration)
    sync_tree(temporary)
    aside = None
    if final.exists():
        aside = folder / f"{final.name}.old-{new_save_id()}"
        os.rename(final, aside)
    try:
        os.rename(temporary, final)
    except OSError:
        if aside is not None:
            os.rename(aside, final)
        raise
    fsync_folder(folder)
    write_text(folder / LATEST, final.name)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)
    return final


def discard(temporary: Path) -> None:
    """Remove a temporary folder; what cannot be removed now is removed by the next save."""
    with contextlib.suppress(OSError):
        shutil.rmtree(temporary)


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint: renamed first, so that a kill half way never leaves half a checkpoint under its name."""
    trash = path.with_name(f"{path.name}.trash-{new_save_id()}")
    os.rename(path, trash)
    fsync_folder(path.parent)
    shutil.rmtree(trash)
