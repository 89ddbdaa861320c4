"""Norms of the residual stream and the addition before them."""

from megatron.ops.norm.operator import add_norm, norm

__all__ = [
    "add_norm",
    "norm",
]
