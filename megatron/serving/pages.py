"""How the states of a model's layers lie in a server's memory: several layers' named tensors one behind the other in a page.

A server hands out pages of one size. Where only states are served, one page holds all of a sequence, without padding but for
alignment. Beside attention, whose pages have their own size, layers are packed into as few pages as wide as the widest layer's
state, so that layers with little state share one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.layers.base import State

ALIGNMENT = 64
"""Bytes; every tensor and every page begins at a multiple of it."""


@dataclass(frozen=True)
class Cell:
    """One state tensor of one layer in a page.

    Attributes:
        layer: number of the block.
        name: of the tensor in the mixer's state.
        shape: of one sequence's part.
        dtype: as the mixer keeps it.
        offset: bytes from the page's begin.
    """

    layer: int
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of one sequence's part."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Page:
    """What lies in one page; `nbytes` is its size."""

    cells: tuple[Cell, ...]
    nbytes: int

    def views(self, raw: Tensor) -> dict[int, dict[str, Tensor]]:
        """Layer -> name -> tensor [pages, ...] that shares memory with the bytes `raw [pages, at least nbytes]`."""
        found: dict[int, dict[str, Tensor]] = {}
        for cell in self.cells:
            part = raw[:, cell.offset : cell.offset + cell.nbytes].view(cell.dtype)
            found.setdefault(cell.layer, {})[cell.name] = part.view(-1, *cell.shape)
        return found


def lay_out(states: Mapping[int, State], together: bool) -> list[Page]:
    """The pages of a sequence.

    Args:
        states: number of the block -> its empty state, batch 1 (on the meta device).
        together: one page for all; else as many as wide as the widest layer's state as they need, the first that has room.

    Raises:
        ValueError: a state tensor is empty, which a page cannot hold.
    """
    sizes = {layer: sum(_aligned(_bytes(t)) for t in state.values()) for layer, state in states.items()}
    if not sizes:
        return []
    width = sum(sizes.values()) if together else max(sizes.values())
    bins: list[list[int]] = []
    for layer in sorted(sizes, key=lambda i: (-sizes[i], i)):
        room = (taken for taken in bins if sum(sizes[i] for i in taken) + sizes[layer] <= width)
        taken = next(room, None)
        if taken is None:
            bins.append([layer])
        else:
            taken.append(layer)
    return [Page(_cells(states, sorted(layers)), width) for layers in bins]


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def _bytes(tensor: Tensor) -> int:
    return tensor[0].numel() * tensor.element_size()


def _cells(states: Mapping[int, State], layers: Sequence[int]) -> tuple[Cell, ...]:
    cells, offset = [], 0
    for layer in layers:
        for name, tensor in states[layer].items():
            if not tensor.numel():
                raise ValueError(f"the state '{name}' of layer {layer} has no size yet: it grows with the text")
            cells.append(Cell(layer, name, tuple(tensor.shape[1:]), tensor.dtype, offset))
            offset += _aligned(_bytes(tensor))
    return tuple(cells)
