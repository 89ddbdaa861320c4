"""Several linear maps of one input as one matrix product.

The maps stay separate parameters with their released names: their rows are concatenated when they are used. If they are
already adjacent in memory (`pack_weights`, or ZeRO's flat buffer) they are read in place. Under autocast and in a compiled
graph, which has no addresses, the rows are concatenated by plain operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops.dispatch import choose, path
from megatron.ops.precision import autocast_dtype, outside_autocast


def packed_bias(bias: Tensor | None, rows: int) -> Tensor | None:
    """`bias` of the last map as a bias of all `rows`, padded with zeros at the front."""
    return None if bias is None else F.pad(bias, (rows - bias.shape[0], 0))


def are_adjacent(weights: Sequence[Tensor]) -> bool:
    """Whether matrices [n_i, d] are adjacent in memory, in this order."""
    offset, storage = weights[0].storage_offset(), weights[0].untyped_storage()._cdata
    for weight in weights:
        # offsets, which meta tensors have too; adjacent addresses may belong to different storages
        if weight.untyped_storage()._cdata != storage or weight.storage_offset() != offset or not weight.is_contiguous():
            return False
        offset += weight.numel()
    return True


def joined_rows(weights: Sequence[Tensor]) -> Tensor:
    """The rows of all weights [n_i, d] as one [sum n_i, d]: a view if they are adjacent in memory, else a copy."""
    if not are_adjacent(weights):
        return torch.cat([w.detach() for w in weights])
    first, d = weights[0], weights[0].shape[1]
    return first.detach().as_strided((sum(w.shape[0] for w in weights), d), (d, 1))


@outside_autocast
class _PackedLinear(torch.autograd.Function):
    """One product forward, two backward. Joined rows are not saved: joining again costs less than a copy of the weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.bias = None if bias is None else bias.shape[0]
        joined = joined_rows(weights)
        return F.linear(x, joined, packed_bias(bias, joined.shape[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        dx = dy @ joined_rows(weights) if ctx.needs_input_grad[0] else None
        flat = dy.flatten(0, -2)
        dweights = (flat.t() @ x.flatten(0, -2)).split([w.shape[0] for w in weights])
        dbias = None if ctx.bias is None else flat[:, flat.shape[1] - ctx.bias :].sum(0)
        return dx, dbias, *dweights


@path("packed_linear", "reference")
def packed_linear_reference(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Separate maps, concatenated."""
    parts = [F.linear(x, weight) for weight in weights]
    return torch.cat(parts if bias is None else [*parts[:-1], parts[-1] + bias], dim=-1)


@path("packed_linear", "torch")
def packed_linear_torch(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """The plain form of `packed_linear`."""
    if torch.compiler.is_compiling():
        return _joined_linear(x, weights, bias)
    return _PackedLinear.apply(x, bias, *weights)


def _joined_linear(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """`packed_linear` with operators that autocast and the compiler support."""
    rows = torch.cat(list(weights))
    return F.linear(x, rows, packed_bias(bias, rows.shape[0]))


def packed_linear(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, backend: str = "auto") -> Tensor:
    """`x [..., d]` times the rows of all `weights` [n_i, d], concatenated: [..., sum n_i]; `bias` belongs to the last map.

    Under autocast it is `F.linear`: inputs and result have autocast's dtype.
    """
    if autocast_dtype(x.device) is not None:
        return _joined_linear(x, weights, bias)
    return choose("packed_linear", backend, x.device)(x, weights, bias)


def pack_weights(parameters: Sequence[Tensor]) -> None:
    """Make matrices [n_i, d] adjacent in memory; the parameters stay the same objects.

    Does nothing if they differ in dtype or device or are on the meta device.
    """
    first = parameters[0]
    if first.is_meta or any(p.dtype != first.dtype or p.device != first.device for p in parameters):
        return
    joined = torch.cat([p.detach() for p in parameters])
    for parameter, view in zip(parameters, joined.split([p.shape[0] for p in parameters]), strict=True):
        parameter.data = view
