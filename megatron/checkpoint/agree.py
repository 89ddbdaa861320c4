"""One verdict of all ranks: an error on one of them must become the same error on every one, never a hang or a half
save.

The texts travel as plain bytes in a collective over the default process group, not over the disk (which may be the
thing that is full) and not as pickles.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron.errors import CheckpointError, UserError


def _device() -> torch.device:
    """Where collectives of the default group want their tensors."""
    if "gloo" in str(dist.get_backend_config()):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def exchange(text: str) -> list[str]:
    """Every rank's text, in rank order, on every rank; without a process group the own text alone. Also a barrier."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return [text]
    data = text.encode()
    device, world = _device(), dist.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(data)], dtype=torch.int64, device=device))
    longest = max(int(size) for size in sizes)
    if longest == 0:
        return [""] * world
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(data)] = torch.tensor(list(data), dtype=torch.uint8, device=device)
    texts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(texts, padded)
    return [bytes(t[: int(n)].tolist()).decode() for t, n in zip(texts, sizes, strict=True)]


class Verdict:
    """Collects what went wrong on this rank until `settle` tells everybody."""

    def __init__(self, what: str, where: str) -> None:
        self.what, self.where, self.error = what, where, ""

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Around one rank's part of the work: an error is kept, not raised, so that nobody is left waiting."""
        try:
            yield
        except UserError as error:
            self.error = str(error)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            self.error = f"{type(error).__name__}: {error}"

    def settle(self) -> None:
        """Raise one CheckpointError on all ranks if any of them failed. A collective: every rank must call it."""
        errors = exchange(self.error)
        failed = [(rank, text) for rank, text in enumerate(errors) if text]
        if not failed:
            return
        if len(errors) == 1:
            why = failed[0][1]
        else:
            why = "\n".join(f"rank {rank}: {text}" for rank, text in failed[:4])
            why += f"\nand {len(failed) - 4} more ranks" if len(failed) > 4 else ""
        raise CheckpointError(self.what, where=self.where, why=why)
