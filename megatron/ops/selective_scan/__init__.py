"""The selective scan of Mamba."""

from megatron.ops.selective_scan.operator import selective_scan, selective_step

__all__ = [
    "selective_scan",
    "selective_step",
]
