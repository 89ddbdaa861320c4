"""Which parameters decay by which rule, and a step that the veto refuses: nothing of it is counted."""

from __future__ import annotations

import pytest
import torch

from megatron.engine.base import EngineSettings
from megatron.engine.optim import build_optimizer, decays, parameter_groups
from megatron.parallel.shard_spec import ParamSpec

_EMBEDDING = ParamSpec("model.embed_tokens.weight", (8, 4), "vocab", "embedding", True, 0)
_MATRIX = ParamSpec("model.layers.0.token_mixer.q_proj.weight", (4, 4), "column", "input", True, 2)
_BIAS = ParamSpec("model.layers.0.token_mixer.q_proj.bias", (4,), "column", "zeros", False, 2)
_GAIN = ParamSpec("model.layers.0.token_norm.weight", (4,), "replicated", "ones", False, 2)
_BALANCE = ParamSpec("model.layers.0.token_mixer.aug_balance", (4,), "heads", "zeros", False, 2)
SPECS = {spec.name: spec for spec in (_EMBEDDING, _MATRIX, _BIAS, _GAIN, _BALANCE)}


@pytest.mark.parametrize(
    ("rule", "decayed"),
    [("neox", (_EMBEDDING, _MATRIX)), ("metala", (_EMBEDDING, _MATRIX, _BALANCE)), ("based", (_MATRIX, _GAIN))],
)
def test_rules_of_decay(rule: str, decayed: tuple[ParamSpec, ...]) -> None:
    assert {spec.name for spec in SPECS.values() if decays(spec, rule)} == {spec.name for spec in decayed}
    tensors = {name: torch.zeros(spec.shape) for name, spec in SPECS.items()}
    first, second = parameter_groups(tensors, SPECS, 0.3, rule)
    assert (first["weight_decay"], second["weight_decay"]) == (0.3, 0.0)
    assert [id(p) for p in first["params"]] == [id(tensors[spec.name]) for spec in decayed]


def test_a_refused_step_changes_and_counts_nothing() -> None:
    param = torch.nn.Parameter(torch.ones(4))
    optimizer = build_optimizer([{"params": [param], "weight_decay": 0.1}], EngineSettings())
    param.grad = torch.ones(4)
    refused = [0.0, 1.0, 0.0]
    seen = []
    for refuse in refused:
        optimizer.skip = lambda refuse=refuse: torch.tensor(refuse)  # type: ignore[misc]
        optimizer.step()
        seen.append((float(optimizer.state_of(param)["step"]), float(param.detach()[0])))
    assert [step for step, _ in seen] == [1.0, 1.0, 2.0]
    assert seen[0][1] == seen[1][1] != seen[2][1]
