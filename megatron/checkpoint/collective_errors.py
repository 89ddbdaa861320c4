"""Collective error check: an error on one rank becomes the same error on all ranks, never a hang or a partial save.

The messages travel as plain bytes in a collective over the default process group, not over the disk (which may be full) and
not as pickles.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron.errors import CheckpointError, DamagedCheckpoint, UserError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _device(group: ProcessGroup | None) -> torch.device:
    """The device on which a group's collectives need their tensors."""
    if "gloo" in str(dist.get_backend_config(group)):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def exchange(text: str, group: ProcessGroup | None = None) -> list[str]:
    """All-gather one text per rank. Also a barrier.

    Args:
        text: this rank's.
        group: of all ranks; None is the default group. Two threads must not share a group.

    Returns:
        The texts in rank order; without a process group only this rank's.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return [text]
    data = text.encode()
    device, world = _device(group), dist.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(data)], dtype=torch.int64, device=device), group=group)
    longest = max(int(size) for size in sizes)
    if longest == 0:
        return [""] * world
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(data)] = torch.tensor(list(data), dtype=torch.uint8, device=device)
    texts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(texts, padded, group=group)
    return [bytes(t[: int(n)].tolist()).decode() for t, n in zip(texts, sizes, strict=True)]


class CollectiveError:
    """Holds this rank's error until `raise_on_all_ranks` raises it everywhere.

    Args:
        what: message for errors that are not a `UserError`; their text becomes the `why`.
        where: place for such errors.
        group: process group for the exchange; None is the default group.
    """

    def __init__(self, what: str, where: str, group: ProcessGroup | None = None) -> None:
        self.what, self.where, self.group = what, where, group
        self.error: dict[str, Any] = {}

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Wrap one rank's share of the work: an error is held, not raised, so that this rank still joins the collective."""
        try:
            yield
        except UserError as error:
            self.error = {"what": error.what, "where": error.where, "why": error.why, "hint": error.hint}
            self.error["damaged"] = isinstance(error, DamagedCheckpoint)
        except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}"
            self.error = {"what": self.what, "where": self.where, "why": reason, "hint": None, "damaged": False}

    def raise_on_all_ranks(self) -> None:
        """Raise one CheckpointError on all ranks if any of them failed. A collective: every rank must call it.

        It is a DamagedCheckpoint if all failures are damage: then an older checkpoint may work.
        """
        errors = exchange(json.dumps(self.error) if self.error else "", self.group)
        failed = {rank: json.loads(text) for rank, text in enumerate(errors) if text}
        if not failed:
            return
        not_damage = {rank: error for rank, error in failed.items() if not error["damaged"]}
        reported = not_damage or failed
        first = next(iter(reported.values()))
        reason = first["why"]
        if len(errors) > 1:
            ranks = ", ".join(str(rank) for rank in list(reported)[:8]) + (", ..." if len(reported) > 8 else "")
            reason = f"{reason} (seen by rank {ranks} of {len(errors)})"
        kind = CheckpointError if not_damage else DamagedCheckpoint
        raise kind(first["what"], where=first["where"], why=reason, hint=first["hint"])
