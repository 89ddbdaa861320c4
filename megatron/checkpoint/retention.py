"""Deletes old checkpoints when a new one has been written (`keep_last_n_checkpoints`).

At least two stay: with only one, a damaged file in it would end the run. A checkpoint counts only if it is verified: its
manifest matches its own checksum, and every file has the listed size and save id. (The bytes are hashed when they are
written and again when they are loaded; a deletion does not read terabytes.)
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from megatron.checkpoint.commit import delete_checkpoint
from megatron.checkpoint.layout import complete_steps
from megatron.checkpoint.manifest import read_manifest
from megatron.errors import CheckpointError
from megatron.files import parse_json

FEWEST = 2
_HEADER_LIMIT = 100 << 20


def is_complete(path: Path) -> bool:
    """Whether a checkpoint's manifest is valid and all its files have the listed size and the manifest's save id."""
    try:
        manifest = read_manifest(path)
        return all(
            (path / name).stat().st_size == entry.size and _save_id(path / name) in (manifest.save_id, None)
            for name, entry in manifest.files.items()
        )
    except (CheckpointError, OSError):
        return False


def _save_id(path: Path) -> str | None:
    """The save id in a shard's header; None for a text file."""
    if path.suffix != ".safetensors":
        return None
    with open(path, "rb") as handle:
        head = handle.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 0 < length <= min(_HEADER_LIMIT, os.fstat(handle.fileno()).st_size - 8):
            return ""
        try:
            return str(parse_json(handle.read(length))["__metadata__"]["save_id"])
        except (ValueError, LookupError, TypeError):
            return ""


def steps_to_delete(
    steps: Iterable[int], written: int, keep_last: int | None, keep: Collection[int], intact: Mapping[int, bool] | None = None
) -> list[int]:
    """Steps to delete, ascending.

    Args:
        steps: all checkpoints.
        written: the one just saved, never deleted (after a rewind it need not be the largest).
        keep_last: how many of the newest stay, at least two; None keeps all.
        keep: steps that always stay (`extra_save_iters`).
        intact: step -> verified. Older ones stay until two verified ones are kept; None treats all as verified.
    """
    if keep_last is None:
        return []
    ordered = sorted(steps)
    newest = set(ordered[-max(FEWEST, keep_last) :])
    retained = {step for step in ordered if step in newest or step in keep or step == written}
    verified = sum(intact is None or intact[step] for step in retained)
    for step in reversed(ordered):
        if verified >= FEWEST:
            break
        if step not in retained and (intact is None or intact[step]):
            retained.add(step)
            verified += 1
    return [step for step in ordered if step not in retained]


def retain(folder: Path, written: int, keep_last: int | None, keep: Collection[int]) -> list[str]:
    """Delete the `steps_to_delete`, damaged ones first. Folders without our manifest are not ours and stay.

    Returns:
        One line per folder that could not be deleted, or that is damaged and stays: a warning, no reason to stop training.
    """
    folders = complete_steps(folder)
    if not steps_to_delete(folders, written, keep_last, keep):
        return []
    intact = {step: is_complete(path) for step, path in folders.items()}
    doomed = steps_to_delete(folders, written, keep_last, keep, intact)
    problems = [
        f"{folders[s]} is damaged; an older checkpoint is kept instead" for s in folders if s not in doomed and not intact[s]
    ]
    for step in sorted(doomed, key=lambda s: (intact[s], s)):
        try:
            delete_checkpoint(folders[step])
        except OSError as error:
            problems.append(f"could not delete the old checkpoint {folders[step]}: {error}")
    return problems
