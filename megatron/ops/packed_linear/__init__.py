"""Several linear maps of one input as one matrix product."""

from megatron.ops.packed_linear.operator import are_adjacent, joined_rows, pack_weights, packed_bias, packed_linear

__all__ = [
    "are_adjacent",
    "joined_rows",
    "pack_weights",
    "packed_bias",
    "packed_linear",
]
