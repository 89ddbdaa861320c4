"""What a single kind of mixer reads (JRT's prefix) reaches the other ranks of a model that is evaluated over a mesh."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from torch import Tensor

from megatron.evaluation.forward import Forward, ForwardBatch
from megatron.launch.environment import read_rank_environment
from megatron.layers.base import Context, inputs_of
from megatron.model.build import build_model
from megatron.model.config import ModelConfig
from megatron.model.lm import LanguageModel
from megatron.parallel.mesh import Mesh
from tests.parallel.ranks import run_ranks

CONFIG = ModelConfig(48, 32, 2, 2, 48, ("based", "jrt"), {"jrt": {"feature_width": 4}, "based": {"feature_width": 4}})
TOKENS = torch.randint(0, 48, (2, 12), generator=torch.Generator().manual_seed(3))
FILLER = (torch.arange(12) >= 2).long().expand(2, -1)
INPUTS: list[dict[str, Tensor | int | None]] = [
    {},
    {"prefix_length": 6, "prefix_mask": None},
    {"prefix_length": 6, "prefix_mask": FILLER},
    {"prefix_length": 0},
]


def model() -> LanguageModel:
    built = build_model(CONFIG).double().eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in built.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.3)
    return built


def on_ranks(pp: int) -> list[Tensor]:
    env = read_rank_environment(os.environ)
    forward = Forward(model(), Mesh.create(pp, 1, env.world_size, env.rank), None, torch.device("cpu"))
    if not forward.leads:
        forward.follow()
        return []
    logits = [forward.prefill(ForwardBatch(TOKENS, None, inputs)) for inputs in INPUTS]
    forward.stop()
    return logits


def test_inputs_are_announced_to_the_pipeline() -> None:
    logits = next(found for found in run_ranks(on_ranks, 2, 2) if found)
    alone = model()
    mixers = [block.token_mixer for block in alone.model.blocks()]
    with torch.inference_mode():
        expected = [alone(TOKENS, Context(inputs=inputs_of(mixers, inputs)))[0][:, -1] for inputs in INPUTS]
    for got, want in zip(logits, expected, strict=True):
        assert (got - want).abs().max() <= 1e-12
    assert all((a - b).abs().max() > 1e-6 for a, b in itertools.pairwise(expected))


def test_inputs_of_other_mixers_are_refused() -> None:
    plain = Forward(build_model(ModelConfig(48, 32, 1, 2, 48, ("metala",))), Mesh.single(), None, torch.device("cpu"))
    with pytest.raises(ValueError, match="prefix_length is an input of other mixers"):
        plain.prefill(ForwardBatch(TOKENS, None, {"prefix_length": 3}))
