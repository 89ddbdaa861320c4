"""Several linear maps of one input as one matrix product, and the pieces of a packed MetaLA projection.

The maps stay separate parameters with their released names: their rows are put one below the other when they are used. Where
they already lie so in memory (`lay_together`, or ZeRO's flat buffer) the fused path of `packed_linear` reads them in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.ops.dispatch import choose, path


def cut_packed(packed: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views q, z [..., h, k] and v, g [..., h, v] of `packed [..., h (2k + 2v)]`; h and k are those of `w [h, k]`."""
    h, k = w.shape
    v = packed.shape[-1] // (2 * h) - k
    q, z, values, gate = packed.split([h * k, h * k, h * v, h * v], dim=-1)
    return q.unflatten(-1, (h, k)), z.unflatten(-1, (h, k)), values.unflatten(-1, (h, v)), gate.unflatten(-1, (h, v))


def packed_bias(bias: Tensor | None, rows: int) -> Tensor | None:
    """`bias` of the last map as one of all `rows`: zeros in front."""
    return None if bias is None else F.pad(bias, (rows - bias.shape[0], 0))


@path("packed_linear", "reference")
@path("packed_linear", "torch")
def packed_linear_torch(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """The plain form of `packed_linear`."""
    joined = torch.cat(list(weights))
    return F.linear(x, joined, packed_bias(bias, joined.shape[0]))


def packed_linear(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, backend: str = "auto") -> Tensor:
    """`x [..., d]` times the rows of all `weights` [n_i, d], side by side: [..., sum n_i]; `bias` belongs to the last map."""
    return choose("packed_linear", backend, x.device)(x, weights, bias)


def lay_together(parameters: Sequence[Tensor]) -> None:
    """Put matrices [n_i, d] one behind the other in memory; they stay the parameters that they are.

    Does nothing where they differ in dtype or device or have no memory yet.
    """
    first = parameters[0]
    if first.is_meta or any(p.dtype != first.dtype or p.device != first.device for p in parameters):
        return
    joined = torch.cat([p.detach() for p in parameters])
    for parameter, piece in zip(parameters, joined.split([p.shape[0] for p in parameters]), strict=True):
        parameter.data = piece
