"""The two halves of a cross entropy over rows of logits."""

from megatron.ops.cross_entropy.operator import row_gradient_, row_stats

__all__ = [
    "row_gradient_",
    "row_stats",
]
