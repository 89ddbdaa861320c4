"""Counts collectives: operation, size, number of ranks, forward or backward.

    with count_traffic() as messages:
        engine.train_step(...)

Every collective of torch.distributed, DeepSpeed's included, goes through the functions that are patched here. Groups of one
rank send nothing and are not counted.
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
    "batch_isend_irecv",
)
_SENDS, _RECEIVES = ("send", "isend"), ("recv", "irecv")


@dataclass(frozen=True)
class Message:
    """One collective.

    Attributes:
        op: its function in torch.distributed; a batch of point-to-point messages is recorded as those messages.
        numel: elements of the full tensor (for a gather, the gathered one).
        bytes: size of the full tensor.
        ranks: size of its group.
        backward: it ran in a backward pass.
    """

    op: str
    numel: int
    bytes: int
    ranks: int
    backward: bool

    @property
    def sent(self) -> float:
        """Bytes that this rank sends: with a ring algorithm 2 (t - 1) / t of the tensor for an all-reduce, half for others."""
        if self.op in _SENDS + _RECEIVES:
            return self.bytes if self.op in _SENDS else 0
        share = (self.ranks - 1) / self.ranks
        return self.bytes * share * (2 if self.op == "all_reduce" else 1)


def _tensor_of(op: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[int, int]:
    """(elements, bytes) of the full tensor; the larger of input and output."""
    sizes = []
    for value in (*arguments, *keywords.values()):
        items = value if isinstance(value, (list, tuple)) else [value]
        tensors = [item for item in items if isinstance(item, Tensor)]
        sizes.append((sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)))
    return max(sizes)


@contextmanager
def count_traffic() -> Iterator[list[Message]]:
    """Record the collectives of this rank inside the context, in order."""
    messages: list[Message] = []
    depth = [0]

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            batch = arguments[0] if name == "batch_isend_irecv" else []
            groups = [a for a in (*arguments, *keywords.values()) if isinstance(a, dist.ProcessGroup)]
            groups += [message.group for message in batch[:1]]
            ranks = dist.get_world_size(groups[0] if groups else None)
            if ranks > 1 and not depth[0]:
                backward = torch._C._current_graph_task_id() != -1
                sent = [(m.op.__name__, _tensor_of(m.op.__name__, (m.tensor,), {})) for m in batch]
                for op, (numel, size) in sent or [(name, _tensor_of(name, arguments, keywords))]:
                    messages.append(Message(op, numel, size, ranks, backward))
            depth[0] += 1  # a collective may call another one, which is not counted again
            try:
                return real(*arguments, **keywords)
            finally:
                depth[0] -= 1

        return wrapper

    replaced = {name: getattr(dist, name) for name in _OPS if hasattr(dist, name)}
    for name, real in replaced.items():
        setattr(dist, name, counted(name, real))
    try:
        yield messages
    finally:
        for name, real in replaced.items():
            setattr(dist, name, real)
