"""Bytes of each engine's buffers and the fullest moment of a step, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron.engine.base import EngineSettings
from megatron.engine.deepspeed_config import LARGEST_BUCKET
from megatron.model.config import ModelConfig
from megatron.parallel.mesh import Mesh
from megatron.planning.dry_run import DeviceLimits, RunShape, _disk, _time, peak
from megatron.planning.fixed_memory import Buffers, deepspeed_buffers, plain_buffers
from megatron.planning.memory import _assemble, _Chain, _local
from megatron.planning.segment_memory import Segment

SETTINGS = EngineSettings()
THREE = Mesh.shape_only(1, 1, 3, 0)  # three data-parallel ranks: 34 of 100 elements each
HALF = replace(SETTINGS, dtype="bf16")


def test_one_process() -> None:
    """fp32: two moments; half: masters too, and the fp32 sums of its gradients, for a moment or for the whole step."""
    assert plain_buffers(100, 4, False) == plain_buffers(100, 4, True) == Buffers(800, 400, 0, 400, True)
    assert plain_buffers(100, 2, True) == Buffers(1200, 400, 400, 200, False)
    assert plain_buffers(100, 2, False) == Buffers(1200, 400, 0, 600, False)


@pytest.mark.parametrize(
    ("settings", "resident", "expected"),
    [
        (replace(SETTINGS, zero_stage=1), False, Buffers(408, 400, 400, 272, False, True)),
        (replace(SETTINGS, zero_stage=0), False, Buffers(408, 400, 400, 272, False, True)),
        (replace(SETTINGS, zero_stage=1), True, Buffers(408, 400, 0, 672, False)),
        (replace(SETTINGS, zero_stage=2), False, Buffers(408, 136, 400, 272, False, True)),
        (replace(SETTINGS, zero_stage=3), False, Buffers(408, 136, 800, 272, False)),
        (replace(SETTINGS, zero_stage=3, gradient_accumulation=2), False, Buffers(408, 136, 800, 272, True)),
        (replace(HALF, zero_stage=1), False, Buffers(408, 400, 400, 536, False)),
        (replace(HALF, zero_stage=3), False, Buffers(408, 136, 600, 272, False)),
        (replace(HALF, zero_stage=1, fp32_grad_accum=False), False, Buffers(408, 200, 200, 272, False, True)),
    ],
)
def test_zero_over_three_ranks(settings: EngineSettings, resident: bool, expected: Buffers) -> None:
    assert deepspeed_buffers(100, THREE, settings, resident) == expected


def test_the_bucket_of_a_large_model_has_deepspeeds_size() -> None:
    assert deepspeed_buffers(10**9, Mesh.shape_only(1, 1, 1, 0), SETTINGS, False).standing == 4 * LARGEST_BUCKET


# kept, forward, backward, gradients of two blocks and the head
PIECES = [Segment(10, 12, 30, 8), Segment(20, 25, 80, 16), Segment(5, 40, 50, 6)]
CHAIN = _Chain(PIECES, True, 3)
PLAIN = Buffers(200, 24, 7, 1, in_place=True)


@pytest.mark.parametrize(
    ("shards", "accumulation", "total"),
    [
        (PLAIN, 1, 310 + 96),  # backward of the second block: 10 + 80, and 6 of the head
        (PLAIN, 2, 313 + 120),  # the same beside the sums of all gradients, 30, of which 6 are counted
        (replace(PLAIN, bucket_takes=True), 1, 310 + 90),  # what the head made lies in the bucket
        (replace(PLAIN, in_place=False), 2, 313 + 96),
        (replace(PLAIN, step=500), 1, 310 + 500),
    ],
)
def test_the_fullest_moment(shards: Buffers, accumulation: int, total: int) -> None:
    settings = replace(SETTINGS, gradient_accumulation=accumulation)
    found = _assemble(CHAIN, 100, shards, 0, 25, Mesh.single(), settings)
    assert found.total == total
    assert (found.activations, found.logits, found.weights, found.optimizer) == (30, 44, 100, 200)


def test_a_pipeline_keeps_as_many_micro_batches_as_there_are_stages_behind() -> None:
    settings, chain = replace(SETTINGS, gradient_accumulation=8), _Chain(PIECES[:2], False, 3)
    kept = [_assemble(chain, 0, PLAIN, 0, 25, Mesh.shape_only(4, 1, 4, rank), settings).activations for rank in range(4)]
    assert kept == [4 * 30, 3 * 30, 2 * 30, 30]


MODEL = ModelConfig(256, 16, 2, 2, 32, ("metala", "metala"))


def test_the_fullest_stage_counts() -> None:
    """With many rows in a vocabulary of its own the last stage, which has the logits, is the fullest."""
    settings = replace(SETTINGS, seq_length=512)
    run = RunShape(2, 1, 1, settings, True, 1, 10, "given")
    untied = replace(MODEL, tie_embeddings=False, vocab_size=4096)
    last = peak(run, untied, {})
    assert last.logits > 0


def test_disk_and_time() -> None:
    run = RunShape(1, 2, 4, replace(SETTINGS, dtype="bf16"), True, 1, 10, "given", keep=2, saves=5)
    assert _disk(run, 2**30) == "14.00 GiB per checkpoint, 2 kept of 5 written: 28.00 GiB"
    assert _disk(replace(run, keep=None), 2**30).endswith("5 kept of 5 written: 70.00 GiB")
    limits = DeviceLimits(1.0, "a test", True, tflops=100.0, mfu=0.5)
    assert _time(run, 8 * 50e12 * 600, limits).startswith("10.0 minutes at 50%")


def test_weights_that_are_measured_have_the_format_of_the_run() -> None:
    """So that their gradients and products are counted as wide as they are."""
    local = _local(MODEL, Mesh.single(), HALF)
    assert {p.dtype for p in local.parameters} == {torch.bfloat16}
