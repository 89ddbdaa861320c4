"""What a single kind of mixer reads travels with the batch through every engine: JRT's prefix, as a number and as a mask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.data.micro_batch import MicroBatch
from megatron.engine.base import EngineSettings
from megatron.errors import ConfigError, DataError
from megatron.model.config import ModelConfig
from megatron.parallel.mesh import Mesh
from megatron.training.micro_batches import take_micro_batches
from tests.engine.engine_cases import SEQ, for_step, make_engine, micro_batches
from tests.parallel.ranks import run_ranks

MODEL = ModelConfig(64, 32, 4, 4, 48, ("based", "jrt") * 2, {"jrt": {"feature_width": 6}, "based": {"feature_width": 6}})
OPTION = replace(MODEL, layer_options={**MODEL.layer_options, "jrt": {"feature_width": 6, "prefix_length": 8}})
SETTINGS = EngineSettings(gradient_accumulation=2)
LENGTH = replace(SETTINGS, inputs=("prefix_length",))
BOTH = replace(SETTINGS, inputs=("prefix_length", "prefix_mask"))


def batches(mesh: Mesh, names: tuple[str, ...], segments: bool) -> Iterator[MicroBatch]:
    for batch in micro_batches(mesh, segments):
        filler = (torch.arange(SEQ) >= 3).long().expand_as(batch.tokens)
        given: dict[str, Tensor | int] = {"prefix_length": 8, "prefix_mask": filler}
        parts = (batch.tokens, batch.labels, batch.loss_mask, batch.segment_ids)
        yield MicroBatch(*parts, inputs={name: given[name] for name in names})


def job(pp: int, kind: str, settings: EngineSettings, config: ModelConfig, segments: bool = False) -> list[Any]:
    """Losses of three steps, and the evaluation loss after them."""
    engine = make_engine(pp, 1, kind, settings, config)
    feed = batches(engine.mesh, settings.inputs, segments)
    losses = [float(engine.train_step(for_step(engine, feed), 1e-2).loss) for _ in range(3)]
    return [*losses, engine.eval_loss(take_micro_batches(batches(engine.mesh, settings.inputs, segments), 2)).loss]


def single(settings: EngineSettings, config: ModelConfig, segments: bool = False) -> list[float]:
    return run_ranks(job, 1, 1, "single", settings, config, segments, connect=False)[0]


@pytest.mark.parametrize("segments", [False, True])
def test_a_length_in_the_batch_is_the_length_in_the_options(segments: bool) -> None:
    expected = single(SETTINGS, OPTION, segments)
    assert single(LENGTH, MODEL, segments) == expected != single(SETTINGS, MODEL, segments)
    assert single(BOTH, MODEL, segments) != expected, "hidden keys count"
    assert single(replace(LENGTH, activation_checkpoint_interval=1), MODEL, segments) == expected


@pytest.mark.slow
@pytest.mark.parametrize(("pp", "zero"), [(2, 1), (1, 2)], ids=["pipeline", "ZeRO-2"])
def test_other_engines_send_them_too(pp: int, zero: int) -> None:
    got = run_ranks(job, 2, pp, "deepspeed", replace(BOTH, zero_stage=zero), MODEL, True, timeout=120)[0]
    assert got == pytest.approx(single(BOTH, MODEL, True), rel=1e-5)


def test_inputs_that_nobody_reads_or_brings_are_refused() -> None:
    with pytest.raises(ConfigError, match="no mixer of this model reads 'prefix_size'"):
        make_engine(1, 1, "single", replace(SETTINGS, inputs=("prefix_size",)), MODEL)
    engine = make_engine(1, 1, "single", LENGTH, MODEL)
    with pytest.raises(DataError, match="brings the inputs \\[\\], the run expects \\['prefix_length'\\]"):
        engine.train_step(for_step(engine, micro_batches(engine.mesh)), 1e-2)
    engine = make_engine(1, 1, "single", SETTINGS, MODEL)
    with pytest.raises(DataError, match="the run expects \\[\\]"):
        engine.train_step(for_step(engine, batches(engine.mesh, ("prefix_length",), False)), 1e-2)
