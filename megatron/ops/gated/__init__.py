"""The product of a gated MLP: activation of one projection times the other one."""

from megatron.ops.gated.operator import GATES, gated, gated_packed

__all__ = [
    "GATES",
    "gated",
    "gated_packed",
]
