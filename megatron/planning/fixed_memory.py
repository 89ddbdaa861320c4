"""Memory of a rank that does not depend on the batch: optimizer, sums of gradients, buckets; for each engine.

`memory.py` adds what a step keeps for its backward.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.engine.base import DTYPES, EngineSettings
from megatron.engine.deepspeed_config import LARGEST_BUCKET
from megatron.parallel.mesh import Mesh

_LIVE = 1_000_000_000  # elements


@dataclass(frozen=True)
class Buffers:
    """Bytes of an engine. standing: buffers that live through the whole step; step: the most while the optimizer runs.

    in_place: gradients of micro batches are summed where autograd leaves them. bucket_takes: what autograd made becomes a view
    of a bucket, which is counted in `standing`.
    """

    optimizer: int
    gradients: int
    standing: int
    step: int
    in_place: bool
    bucket_takes: bool = False


def share(count: int, mesh: Mesh) -> int:
    """Elements of one data-parallel rank where `count` of them are shared out."""
    return -(-count // mesh.dp)


def plain_buffers(count: int, width: int, accumulates: bool) -> Buffers:
    """`engine/single_process.py`: narrow weights have masters and fp32 sums of their gradients."""
    if width == 4:
        return Buffers(count * 8, count * 4, 0, count * 4, True)
    return Buffers(count * 12, count * 4, count * 4 if accumulates else 0, count * (width + (0 if accumulates else 4)), False)


def deepspeed_buffers(count: int, mesh: Mesh, settings: EngineSettings, resident: bool) -> Buffers:
    """DeepSpeed's ZeRO optimizers: masters in fp32 always, also of fp32 weights; gradients pass through a bucket."""
    stage, width = max(settings.zero_stage, 1), DTYPES[settings.dtype].itemsize
    wide = 4 if settings.fp32_grad_accum else width
    own, accumulates = share(count, mesh), settings.gradient_accumulation > 1
    sums = (own if stage >= 2 else count) * wide
    bucket = min(count, LARGEST_BUCKET) * wide
    if stage == 3:  # gathered weights stay until a billion are alive (stage3_max_live_parameters)
        bucket += min(count, _LIVE) * width
    if stage == 3 or wide != width:
        return Buffers(own * 12, sums, bucket, sums + own * 4, accumulates)
    if resident:
        return Buffers(own * 12, sums, 0, bucket + own * 8, accumulates)
    return Buffers(own * 12, sums, bucket, own * 8, in_place=False, bucket_takes=True)
