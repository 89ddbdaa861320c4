"""Several linear maps of one input as one matrix product."""

from megatron.ops.packed_linear.operator import joined_rows, lie_together, pack_weights, packed_bias, packed_linear

__all__ = [
    "joined_rows",
    "lie_together",
    "pack_weights",
    "packed_bias",
    "packed_linear",
]
