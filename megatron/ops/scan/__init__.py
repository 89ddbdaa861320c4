"""The gated linear scan, the operator of most linear-attention mixers."""

from megatron.ops.scan.operator import empty_scan_state, gated_scan, gated_scan_step, scan_quadratic, scan_recurrent

__all__ = [
    "empty_scan_state",
    "gated_scan",
    "gated_scan_step",
    "scan_quadratic",
    "scan_recurrent",
]
