"""Summary of Mamba's selective scan: the state that a shard leaves behind, and its total decay.

    A: the last state of a scan from an empty one        D = exp((dt_1 + ... + dt_s) rates)

per channel and state. The scan runs a first time for A; every path of it has a hand-written backward.

Shapes as in `ops/selective_scan/operator.py`: u, dt [b, s, d], rates [d, n], B [b, s, n], A and D [b, d, n].
"""

from __future__ import annotations

from torch import Tensor

from megatron.ops.precision import in_accumulation_dtype, outside_autocast
from megatron.ops.selective_scan.operator import selective_scan


@outside_autocast
def selective_summary(
    u: Tensor, dt: Tensor, rates: Tensor, b: Tensor, segment_ids: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """What a shard leaves behind in `selective_scan`, A and D [b, d, n]; arguments as there."""
    _, state = selective_scan(u, dt, rates, b, b, segment_ids=segment_ids, backend=backend)
    return state, (in_accumulation_dtype(dt).sum(1).unsqueeze(-1) * in_accumulation_dtype(rates)).exp()
