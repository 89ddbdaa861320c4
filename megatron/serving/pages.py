"""Memory layout of recurrent states in a server: a page contains the concatenated state tensors of one or more layers.

A server allocates pages of one size. In a model without attention one page contains all states of a sequence, padded for
alignment only. In a model with attention, whose pages have their own size, a page is as large as the largest layer's state, and
several layers with small states share a page.
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
        layer: index of the block.
        name: name of the tensor in the mixer's state.
        shape: shape for one sequence.
        dtype: dtype of the mixer's state.
        offset: bytes from the start of the page.
    """

    layer: int
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes per sequence."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Page:
    """Layout of one page; `nbytes` is its size."""

    cells: tuple[Cell, ...]
    nbytes: int

    def views(self, raw: Tensor) -> dict[int, dict[str, Tensor]]:
        """Layer -> name -> tensor [pages, ...] that shares memory with the bytes `raw [pages, at least nbytes]`."""
        states: dict[int, dict[str, Tensor]] = {}
        for cell in self.cells:
            part = raw[:, cell.offset : cell.offset + cell.nbytes].view(cell.dtype)
            states.setdefault(cell.layer, {})[cell.name] = part.view(-1, *cell.shape)
        return states


def lay_out(states: Mapping[int, State], together: bool) -> list[Page]:
    """Assign the states of a sequence to pages.

    Args:
        states: index of the block -> its empty state, batch size 1 (on the meta device).
        together: one page for all layers; else pages of the largest layer's size, filled by first fit.

    Raises:
        ValueError: a state tensor is empty and grows with the text, so that its size is not fixed.
    """
    sizes = {layer: sum(_aligned(_bytes(t)) for t in state.values()) for layer, state in states.items()}
    if not sizes:
        return []
    width = sum(sizes.values()) if together else max(sizes.values())
    bins: list[list[int]] = []
    for layer in sorted(sizes, key=lambda i: (-sizes[i], i)):
        fitting = (layers for layers in bins if sum(sizes[i] for i in layers) + sizes[layer] <= width)
        first_fit = next(fitting, None)
        if first_fit is None:
            bins.append([layer])
        else:
            first_fit.append(layer)
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
