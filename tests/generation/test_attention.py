"""Generation with attention models: steps through the cache equal whole passes, alone and in a padded batch."""

from __future__ import annotations

import pytest
import torch

from megatron.generation.sample import Sampling, generate
from megatron.model.build import build_model
from megatron.model.config import ModelConfig
from megatron.model.lm import LanguageModel

KINDS = {
    "alibi": ModelConfig(50, 32, 2, 4, 48, ("alibi", "global")),
    "rotary window": ModelConfig(
        50, 32, 2, 4, 48, ("global",) * 2, {"global": {"positions": "rotary", "window": 6, "kv_heads": 2}}
    ),
    "learned": ModelConfig(50, 32, 2, 4, 48, ("global", "metala"), learned_positions=64, parallel_residual=True),
    "sliding": ModelConfig(50, 32, 2, 4, 48, ("sliding", "global"), {"sliding": {"window": 4}}),
}
PROMPTS = [[3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13], [7], [20, 21, 22]]


def make(config: ModelConfig) -> LanguageModel:
    torch.manual_seed(1)
    model = build_model(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.5 if p.dim() > 1 else 1.0))
    return model


@pytest.mark.parametrize("name", KINDS)
def test_steps_equal_whole_passes_in_any_batch(name: str) -> None:
    model = make(KINDS[name])
    together = generate(model, PROMPTS, Sampling(maximum_tokens=20), eod=0)
    again = generate(model, PROMPTS, Sampling(maximum_tokens=20, recompute=True), eod=0)
    alone = [generate(model, [prompt], Sampling(maximum_tokens=20), eod=0)[0] for prompt in PROMPTS]
    for a, b, c in zip(together, again, alone, strict=True):
        assert a.tokens == b.tokens == c.tokens
    assert len({tuple(r.tokens) for r in together}) == 3 and max(len(r.tokens) for r in together) > 5
