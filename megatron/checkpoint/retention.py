"""Which checkpoints go when a new one has been written (`keep_last_n_checkpoints`)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from megatron.checkpoint.commit import delete_checkpoint
from megatron.checkpoint.layout import whole_steps


def superfluous(steps: Iterable[int], written: int, keep_last: int | None, keep: Collection[int]) -> list[int]:
    """Steps to delete, ascending.

    Args:
        steps: all checkpoints there are. written: the one just saved, never deleted (after a rewind it need not be
            the largest).
        keep_last: how many of the newest stay; None keeps all.
        keep: steps that stay in any case (`extra_save_iters`).
    """
    if keep_last is None:
        return []
    ordered = sorted(steps)
    newest = set(ordered[-max(1, keep_last) :])
    return [step for step in ordered if step not in newest and step not in keep and step != written]


def retain(folder: Path, written: int, keep_last: int | None, keep: Collection[int]) -> list[str]:
    """Delete what `superfluous` names. Folders without our manifest are not ours and are left alone.

    Returns:
        One line per folder that could not be deleted: a reason to warn, not to stop training.
    """
    problems = []
    there = whole_steps(folder)
    for step in superfluous(there, written, keep_last, keep):
        try:
            delete_checkpoint(there[step])
        except OSError as error:
            problems.append(f"could not delete the old checkpoint {there[step]}: {error}")
    return problems
