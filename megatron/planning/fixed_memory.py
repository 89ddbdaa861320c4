"""Memory of a rank that does not depend on the batch: optimizer, gradient sums, buckets; for each engine.

`memory.py` adds what a step saves for its backward.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.engine.base import DTYPES, EngineSettings
from megatron.engine.deepspeed_config import LARGEST_BUCKET
from megatron.parallel.mesh import Mesh

_LIVE = 1_000_000_000  # elements; DeepSpeed's default of stage3_max_live_parameters


@dataclass(frozen=True)
class Buffers:
    """Bytes of an engine's buffers.

    Attributes:
        optimizer: masters and moments.
        gradients: gradient sums.
        standing: buffers that live during the entire step.
        step: peak while the optimizer runs.
        in_place: gradients of micro batches are summed where autograd leaves them.
        bucket_takes: a gradient becomes a view of a bucket, which is counted in `standing`.
    """

    optimizer: int
    gradients: int
    standing: int
    step: int
    in_place: bool
    bucket_takes: bool = False


def share(count: int, mesh: Mesh) -> int:
    """Elements of one data-parallel rank when `count` are partitioned."""
    return -(-count // mesh.dp)


def plain_buffers(count: int, width: int, accumulates: bool) -> Buffers:
    """Buffers of `engine/single_process.py`: 16-bit weights have fp32 masters and fp32 gradient sums.

    Args:
        count: parameters of the rank.
        width: bytes of one weight.
        accumulates: gradients of several micro batches are summed.
    """
    if width == 4:
        return Buffers(count * 8, count * 4, 0, count * 4, True)
    return Buffers(count * 12, count * 4, count * 4 if accumulates else 0, count * (width + (0 if accumulates else 4)), False)


def deepspeed_buffers(count: int, mesh: Mesh, settings: EngineSettings, resident: bool) -> Buffers:
    """Buffers of DeepSpeed's ZeRO optimizers: fp32 masters even of fp32 weights; gradients pass through a bucket.

    Args:
        count: parameters of the rank.
        mesh: sizes.
        settings: of the engine.
        resident: count the bucket only as far as it is filled, as the resident set of a CPU process does.
    """
    stage, width = max(settings.zero_stage, 1), DTYPES[settings.dtype].itemsize
    sum_width = 4 if settings.fp32_grad_accum else width
    local, accumulates = share(count, mesh), settings.gradient_accumulation > 1
    sums = (local if stage >= 2 else count) * sum_width
    bucket = min(count, LARGEST_BUCKET) * sum_width
    if stage == 3:  # gathered weights stay until `_LIVE` elements are alive
        bucket += min(count, _LIVE) * width
    if stage == 3 or sum_width != width:
        return Buffers(local * 12, sums, bucket, sums + local * 4, accumulates)
    if resident:
        return Buffers(local * 12, sums, 0, bucket + local * 8, accumulates)
    return Buffers(local * 12, sums, bucket, local * 8, in_place=False, bucket_takes=True)
