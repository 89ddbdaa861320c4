"""The dry run: counts on fake tensors, the parts of an engine, the verdict and its advice."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron.engine.base import EngineSettings
from megatron.errors import ConfigError
from megatron.model.build import param_specs
from megatron.model.config import ModelConfig
from megatron.parallel.mesh import Mesh
from megatron.planning.capacity import limits
from megatron.planning.dry_run import DeviceLimits, RunShape, advice, peak, report
from megatron.planning.memory import rank_memory
from megatron.planning.segment_memory import measure

MODEL = ModelConfig(vocab_size=256, hidden_size=64, num_layers=4, num_heads=4, mlp_width=128, layer_types=("global",) * 4)
SETTINGS = EngineSettings(micro_batch=4, seq_length=64)
COUNT = sum(math.prod(spec.shape) for spec in param_specs(MODEL).values())
WIDE = 64 * 4 * 64 * 4  # bytes of one [b, s, d] in fp32


def of(settings: EngineSettings = SETTINGS, deepspeed: bool = False, **mesh: int) -> object:
    sizes = {"pp": 1, "tp": 1, "world": 1, "rank": 0, **mesh}
    return rank_memory(MODEL, Mesh.shape_only(sizes["pp"], sizes["tp"], sizes["world"], sizes["rank"]), settings, deepspeed)


def test_a_chain_of_known_size_is_counted_to_the_byte() -> None:
    """x [8, 16] -> Linear(16, 32) -> ReLU: kept is what autograd saves (the ReLU's output); backward adds gradients."""
    with FakeTensorMode(), torch.device("cpu"):
        layer = nn.Linear(16, 32)
        x = torch.empty(8, 16, requires_grad=True)
        piece = measure(lambda x: torch.relu(layer(x)), [layer], x)
    out = 8 * 32 * 4
    assert piece.saved == out
    assert piece.forward == 2 * out
    assert piece.gradients == (16 * 32 + 32) * 4
    assert piece.backward >= piece.saved + out + piece.gradients + 8 * 16 * 4


def test_parts_of_one_process() -> None:
    found = of()
    assert (found.parameters, found.weights, found.gradients, found.optimizer) == (COUNT, 4 * COUNT, 4 * COUNT, 8 * COUNT)
    assert found.recomputed < found.activations
    assert found.total > found.weights + found.optimizer + found.activations
    narrow = of(replace(SETTINGS, dtype="bf16"))
    assert (narrow.weights, narrow.optimizer) == (2 * COUNT, 12 * COUNT)
    assert narrow.activations < 0.65 * found.activations  # what the kernels keep in fp32 stays


def test_recomputation_keeps_the_inputs_of_blocks() -> None:
    found = of(replace(SETTINGS, activation_checkpoint_interval=1))
    assert found.activations == found.recomputed == 5 * WIDE  # the embedding's output and that of each block


def test_activations_grow_with_the_batch_and_weights_do_not() -> None:
    one, two = of(), of(replace(SETTINGS, micro_batch=8))
    assert two.activations == pytest.approx(2 * one.activations, rel=0.02)
    assert two.weights == one.weights


def test_meshes_cut_what_they_cut() -> None:
    one = of(deepspeed=True)
    zero = of(deepspeed=True, world=2)
    assert zero.optimizer == pytest.approx(one.optimizer / 2, rel=1e-3)
    assert zero.weights == one.weights
    three = of(replace(SETTINGS, zero_stage=3), deepspeed=True, world=2)
    assert three.weights == pytest.approx(one.weights / 2, rel=1e-3)
    tensor = of(deepspeed=True, tp=2, world=2)
    assert tensor.weights < 0.6 * one.weights
    assert tensor.activations < 0.8 * one.activations
    deep = replace(SETTINGS, gradient_accumulation=4)
    first, last = (of(deep, deepspeed=True, pp=2, world=2, rank=rank) for rank in (0, 1))
    assert first.parameters + last.parameters == COUNT + 256 * 64, "the tied matrix is held at both ends"
    assert first.activations > 1.5 * last.activations, "the first stage holds two micro batches"
    assert first.logits == 0


def test_a_mesh_that_the_model_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="heads"):
        of(deepspeed=True, tp=3, world=3)


RUN = RunShape(1, 1, 1, SETTINGS, False, 4, 100, "given", keep=2, saves=5)


def limit(gib: float) -> DeviceLimits:
    return DeviceLimits(gib, "a test", True, tflops=100.0, mfu=0.5)


def test_verdict_time_and_disk() -> None:
    made = report(RUN, MODEL, limit(4))
    assert made.fits and made.binding
    assert "fits into 4.0 GiB" in made.text
    assert "at 50% of 100 TFLOP/s on each of 1 devices" in made.text
    assert "2 kept of 5 written" in made.text
    assert "one change" not in made.text


def test_the_cheapest_change_that_makes_it_fit_is_named() -> None:
    total = of().total
    made = report(RUN, MODEL, limit(1 + (total - 1) / 2**30))
    assert not made.fits
    assert "checkpoint_activations: true takes" in made.text
    small = replace(RUN, settings=replace(SETTINGS, activation_checkpoint_interval=1, loss_chunk_tokens=16))
    assert advice(small, MODEL, of(small.settings).total - 1, {}).startswith("train_micro_batch_size_per_gpu: 2, gradient_acc")
    assert advice(replace(RUN, pp=4, tp=4, settings=replace(small.settings, micro_batch=1)), MODEL, 1.0, {}) == ""


@pytest.mark.parametrize(("mixer", "heads", "largest"), [("mamba", 1, 8), ("global", 4, 4)])
def test_tensor_ranks_are_advised_where_the_model_can_be_cut(mixer: str, heads: int, largest: int) -> None:
    """Mamba has no heads that could stand in the way."""
    model = replace(MODEL, num_heads=heads, layer_types=(mixer,), num_layers=1)
    settings = replace(SETTINGS, activation_checkpoint_interval=1, loss_chunk_tokens=4, micro_batch=1, seq_length=8)
    run, known = replace(RUN, settings=settings), {}
    room = peak(replace(run, tp=largest, deepspeed=True), model, known).total
    assert advice(run, model, room, known).startswith(f"model_parallel_size: {largest} (")


def test_limits_of_this_machine_do_not_bind_and_given_ones_do() -> None:
    assert limits(80.0, None, 0.4, 8).binding
    if not torch.cuda.is_available():
        here = limits(None, None, 0.4, 2)
        assert not here.binding
        assert here.memory_gib == pytest.approx(limits(None, None, 0.4, 1).memory_gib / 2)
