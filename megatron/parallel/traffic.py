"""Counts collectives: what was sent, how large, over how many ranks, in the forward or the backward pass.

    with count_traffic() as messages:
        engine.train_step(...)

Every collective of torch.distributed goes through the functions replaced here, DeepSpeed's included. Groups of one rank send
nothing and are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_OPS = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
    "broadcast",
    "reduce",
    "all_to_all_single",
    "send",
    "recv",
    "isend",
    "irecv",
)


@dataclass(frozen=True)
class Message:
    """One collective. numel, bytes: of the whole tensor it is about (the gathered one of a gather). ranks: of its group."""

    op: str
    numel: int
    bytes: int
    ranks: int
    backward: bool

    @property
    def sent(self) -> float:
        """Bytes that each rank sends with the usual ring: 2 (t - 1) / t of the tensor for an all-reduce, half for the rest."""
        share = (self.ranks - 1) / self.ranks
        return self.bytes * share * (2 if self.op == "all_reduce" else 1)


def _tensor_of(op: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[int, int]:
    """(elements, bytes) of the whole tensor; the larger of input and output."""
    sizes = []
    for value in (*arguments, *keywords.values()):
        parts = value if isinstance(value, (list, tuple)) else [value]
        tensors = [part for part in parts if isinstance(part, Tensor)]
        sizes.append((sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)))
    return max(sizes)


@contextmanager
def count_traffic() -> Iterator[list[Message]]:
    """Collectives that this rank takes part in while inside, in order."""
    found: list[Message] = []
    depth = [0]

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            groups = [a for a in (*arguments, *keywords.values()) if isinstance(a, dist.ProcessGroup)]
            ranks = dist.get_world_size(groups[0] if groups else None)
            if ranks > 1 and not depth[0]:
                numel, size = _tensor_of(name, arguments, keywords)
                backward = torch._C._current_graph_task_id() != -1
                found.append(Message(name, numel, size, ranks, backward))
            depth[0] += 1  # one may be written with another
            try:
                return real(*arguments, **keywords)
            finally:
                depth[0] -= 1

        return wrapper

    replaced = {name: getattr(dist, name) for name in _OPS if hasattr(dist, name)}
    for name, real in replaced.items():
        setattr(dist, name, counted(name, real))
    try:
        yield found
    finally:
        for name, real in replaced.items():
            setattr(dist, name, real)
