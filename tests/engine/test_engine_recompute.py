"""Recomputed blocks draw the dropout of the first pass again: gradients are those of stored activations, bitwise."""

from __future__ import annotations

import pytest
import torch

from megatron import registry
from megatron.data.micro_batch import MicroBatch
from megatron.engine.base import EngineSettings
from megatron.engine.single_process import SingleProcessEngine
from megatron.model.config import ModelConfig

MIXERS = sorted(registry.layer_options())
WITH_DROPOUT = [name for name in MIXERS if "dropout" in registry.layer_options()[name]]


def _gradients(config: ModelConfig, interval: int) -> dict[str, torch.Tensor]:
    settings = EngineSettings(micro_batch=2, seq_length=12, activation_checkpoint_interval=interval)
    engine = SingleProcessEngine(config, settings, torch.device("cpu"))
    text = torch.randint(0, 32, (2, 13), generator=torch.Generator().manual_seed(1))
    batch = MicroBatch(text[:, :-1], text[:, 1:], torch.ones(2, 12))
    torch.manual_seed(5)
    engine._loss(batch, None).backward()
    return {name: p.grad.clone() for name, p in engine.parameters().items() if p.grad is not None}


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize(
    ("mixer", "hidden", "attention"), [(m, 0.2, 0.0) for m in MIXERS] + [(m, 0.0, 0.2) for m in WITH_DROPOUT]
)
def test_recomputed_gradients_are_those_of_stored_activations(
    mixer: str, hidden: float, attention: float, interval: int
) -> None:
    options = {mixer: {"dropout": attention}} if attention else {}
    config = ModelConfig(32, 16, 3, 2, 24, (mixer,) * 3, options, hidden_dropout=hidden)
    stored, recomputed = _gradients(config, 0), _gradients(config, interval)
    assert stored.keys() == recomputed.keys()
    assert all(torch.equal(stored[name], recomputed[name]) for name in stored)
    still = _gradients(ModelConfig(32, 16, 3, 2, 24, (mixer,) * 3), 0)
    assert any(not torch.equal(stored[name], still[name]) for name in stored), "there is no dropout in this model"
