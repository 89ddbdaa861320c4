"""One outcome on all ranks: an error on one of them must become the same error on every one, never a hang or a half
save.

The texts travel as plain bytes in a collective over the default process group, not over the disk (which may be the
thing that is full) and not as pickles.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron.checkpoint.damage import DamagedCheckpoint
from megatron.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _device(group: ProcessGroup | None) -> torch.device:
    """Where collectives of a group want their tensors."""
    if "gloo" in str(dist.get_backend_config(group)):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def exchange(text: str, group: ProcessGroup | None = None) -> list[str]:
    """Every rank's text, in rank order, on every rank; without a process group the own text alone. Also a barrier.

    Args:
        group: of all ranks; None is the default group. Two threads must not use one group.
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
    """Collects what went wrong on this rank until `raise_on_all_ranks` tells everybody.

    Args:
        what, where: the message for errors that are not a `UserError`, whose cause is then the `why`.
        group: which `exchange` to use.
    """

    def __init__(self, what: str, where: str, group: ProcessGroup | None = None) -> None:
        self.what, self.where, self.group = what, where, group
        self.error: dict[str, Any] = {}

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Around one rank's part of the work: an error is kept, not raised, so that nobody is left waiting."""
        try:
            yield
        except UserError as error:
            self.error = {"what": error.what, "where": error.where, "why": error.why, "hint": error.hint}
            self.error["damaged"] = isinstance(error, DamagedCheckpoint)
        except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
            why = f"{type(error).__name__}: {error}"
            self.error = {"what": self.what, "where": self.where, "why": why, "hint": None, "damaged": False}

    def raise_on_all_ranks(self) -> None:
        """Raise one CheckpointError on all ranks if any of them failed. A collective: every rank must call it.

        It is a DamagedCheckpoint when damage is all that was met: then an older checkpoint may do.
        """
        errors = exchange(json.dumps(self.error) if self.error else "", self.group)
        failed = {rank: json.loads(text) for rank, text in enumerate(errors) if text}
        if not failed:
            return
        others = {rank: error for rank, error in failed.items() if not error["damaged"]}
        told = others or failed
        first = next(iter(told.values()))
        why = first["why"]
        if len(errors) > 1:
            seen = ", ".join(str(rank) for rank in list(told)[:8]) + (", ..." if len(told) > 8 else "")
            why = f"{why} (seen by rank {seen} of {len(errors)})"
        kind = CheckpointError if others else DamagedCheckpoint
        raise kind(first["what"], where=first["where"], why=why, hint=first["hint"])
