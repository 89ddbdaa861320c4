"""The commit protocol: renames that turn a temporary folder into a checkpoint, in an order that survives a kill at any point.

    1  global_step<N>.tmp-<id> is filled and synced, its manifest last
    2  an existing global_step<N> is renamed to .old-<id>
    3  the temporary folder is renamed to global_step<N>; the save folder is synced
    4  `latest` is replaced
    5  the .old-<id> folder is deleted

Between 2 and 3 step N has only the copies .old-<id> and .tmp-<id>; `recover` (at the next save) and `find_checkpoint` (at a
load) take the old one, which has been published before. Only rank 0 renames and deletes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from pathlib import Path

from megatron.checkpoint.layout import LATEST, MANIFEST, leftover_folders, step_folders, tag_of
from megatron.errors import CheckpointError
from megatron.files import fsync_folder, write_text


def new_save_id() -> str:
    """A unique id of a save; it is in the temporary folder's name and in the header of every shard file."""
    return uuid.uuid4().hex[:12]


def temporary_folder(folder: Path, iteration: int, save_id: str) -> Path:
    """The folder that a save writes into."""
    return folder / f"{tag_of(iteration)}.tmp-{save_id}"


def recover(folder: Path) -> list[str]:
    """Remove what an interrupted save left in `folder`; a step that was set aside but not replaced gets its name back.

    Returns:
        The names that were removed or renamed, for the log.
    """
    handled = []
    steps = step_folders(folder)
    for step, path in leftover_folders(folder, "old"):
        if step not in steps and (path / MANIFEST).is_file():  # killed between the two renames: this is the only copy
            os.rename(path, folder / tag_of(step))
            steps = step_folders(folder)
        else:
            shutil.rmtree(path)
        handled.append(path.name)
    for kind in ("tmp", "trash"):
        for _, path in leftover_folders(folder, kind):
            shutil.rmtree(path)
            handled.append(path.name)
    if handled:
        fsync_folder(folder)
    return handled


def check_space(folder: Path, needed: int) -> None:
    """Refuse a save that cannot fit, before anything is written.

    Args:
        folder: the save folder.
        needed: bytes that all ranks together will write.

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
    """Make the names in `folder` and its subfolders durable; their files are synced when they are written."""
    for child in sorted(folder.iterdir()):
        if child.is_dir():
            sync_tree(child)
    fsync_folder(folder)


def publish(temporary: Path, iteration: int) -> Path:
    """Give a filled temporary folder its final name and point `latest` at it.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: a rename or a sync failed; previous checkpoints are unchanged.
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
    # The new name must be durable before `latest` names it: after a power loss `latest` would point at nothing.
    fsync_folder(folder)
    write_text(folder / LATEST, final.name)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)
    return final


def discard(temporary: Path) -> None:
    """Remove a temporary folder; the next save retries what cannot be removed now."""
    with contextlib.suppress(OSError):
        shutil.rmtree(temporary)


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint, renamed first: a kill during the deletion leaves no partial checkpoint under its name."""
    trash = path.with_name(f"{path.name}.trash-{new_save_id()}")
    os.rename(path, trash)
    fsync_folder(path.parent)
    shutil.rmtree(trash)
