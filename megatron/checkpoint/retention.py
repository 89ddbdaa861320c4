"""Which checkpoints go when a new one has been written (`keep_last_n_checkpoints`).

Two is the least: while there is one, a damaged file in it is the end of the run. A checkpoint that is kept counts only when
it is verified: its manifest agrees with its own checksum and every file has the listed length and save. (The bytes were
hashed while they were written and are hashed again when they are loaded; reading terabytes at each deletion is not done.)
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from megatron.checkpoint.commit import delete_checkpoint
from megatron.checkpoint.layout import whole_steps
from megatron.checkpoint.manifest import read_manifest
from megatron.errors import CheckpointError
from megatron.files import parse_json

FEWEST = 2
_HEADER_LIMIT = 100 << 20


def is_whole(path: Path) -> bool:
    """Whether a checkpoint's manifest is good and all its files have the listed length and the manifest's save id."""
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


def superfluous(
    steps: Iterable[int], written: int, keep_last: int | None, keep: Collection[int], whole: Mapping[int, bool] | None = None
) -> list[int]:
    """Steps to delete, ascending.

    Args:
        steps: all checkpoints there are. written: the one just saved, never deleted (after a rewind it need not be
            the largest).
        keep_last: how many of the newest stay, at least two; None keeps all.
        keep: steps that stay in any case (`extra_save_iters`).
        whole: step -> verified. Older ones stay until two verified ones are kept; None takes all for verified.
    """
    if keep_last is None:
        return []
    ordered = sorted(steps)
    newest = set(ordered[-max(FEWEST, keep_last) :])
    kept = {step for step in ordered if step in newest or step in keep or step == written}
    good = sum(whole is None or whole[step] for step in kept)
    for step in reversed(ordered):
        if good >= FEWEST:
            break
        if step not in kept and (whole is None or whole[step]):
            kept.add(step)
            good += 1
    return [step for step in ordered if step not in kept]


def retain(folder: Path, written: int, keep_last: int | None, keep: Collection[int]) -> list[str]:
    """Delete what `superfluous` names, damaged ones first. Folders without our manifest are not ours and are left alone.

    Returns:
        One line per folder that could not be deleted or is kept although damaged: a reason to warn, not to stop training.
    """
    there = whole_steps(folder)
    if not superfluous(there, written, keep_last, keep):
        return []
    whole = {step: is_whole(path) for step, path in there.items()}
    going = superfluous(there, written, keep_last, keep, whole)
    problems = [f"{there[s]} is damaged, an older checkpoint stays for it" for s in there if s not in going and not whole[s]]
    for step in sorted(going, key=lambda s: (whole[s], s)):
        try:
            delete_checkpoint(there[step])
        except OSError as error:
            problems.append(f"could not delete the old checkpoint {there[step]}: {error}")
    return problems
