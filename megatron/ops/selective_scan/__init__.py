"""The selective scan of Mamba."""

from megatron.ops.selective_scan.gate import scan_gate
from megatron.ops.selective_scan.operator import selective_scan, selective_step, selective_step_

__all__ = [
    "scan_gate",
    "selective_scan",
    "selective_step",
    "selective_step_",
]
