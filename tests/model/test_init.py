"""Initial values by role: which method a role takes, bounds of the uniform ones, Mamba's own, and depth where it counts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron.model.config import ModelConfig
from megatron.model.init import initial_value
from megatron.parallel.shard_spec import ParamSpec

CONFIG = ModelConfig(64, 64, 8, 2, 128, ("metala",) * 8, init_method="normal", output_init_method="small_init")


def _value(role: str, config: ModelConfig = CONFIG, seed: int = 1, shape: tuple[int, ...] = (64, 256)) -> torch.Tensor:
    return initial_value(ParamSpec("a.weight", shape, "replicated", role, True, 2), config, seed)


def test_input_and_output_matrices_take_their_own_methods() -> None:
    assert float(_value("input").std()) == pytest.approx(0.02, rel=0.03)
    assert float(_value("embedding").std()) == pytest.approx(0.02, rel=0.03)
    assert float(_value("output").std()) == pytest.approx(math.sqrt(2 / 320), rel=0.03)


@pytest.mark.parametrize(
    ("method", "sigma"),
    [
        ("scaled_normal", 0.02 / 4),
        ("single_residual_scaled_normal", 0.02 / math.sqrt(8)),
        ("wang_init", 2 / 8 / 8),
        ("orthogonal", 1 / 16),
        ("scaled_orthogonal", 1 / 32),
    ],
)
def test_methods_that_know_the_depth(method: str, sigma: float) -> None:
    assert float(_value("input", replace(CONFIG, init_method=method)).std()) == pytest.approx(sigma, rel=0.03)


def test_mambas_own() -> None:
    a = _value("log_range", shape=(3, 5)).exp()
    assert torch.allclose(a, torch.arange(1.0, 6.0).expand(3, 5))
    step = torch.nn.functional.softplus(_value("step_size", shape=(20000,)))
    assert 0.001 <= float(step.min()) < 0.0011 and 0.09 < float(step.max()) <= 0.1001
    assert float(step.log().mean()) == pytest.approx(math.log(1e-2), abs=0.05)  # log-uniform
    for role, bound in (("uniform_input", 1 / 16), ("uniform_output", 1 / math.sqrt(256 * 8)), ("uniform 0.5", 0.5)):
        value = _value(role)
        assert bound * 0.99 < float(value.abs().max()) <= bound, role
    methods = replace(CONFIG, mixer_init="methods")
    assert float(_value("uniform_input", methods).std()) == pytest.approx(0.02, rel=0.03)
    assert float(_value("uniform_output", methods).std()) == pytest.approx(math.sqrt(2 / 320), rel=0.03)


def test_plain_roles_and_what_a_value_depends_on() -> None:
    assert bool((_value("ones") == 1).all()) and bool((_value("zeros") == 0).all())
    conv = _value("conv", shape=(256, 1, 4))
    assert 0.49 < float(conv.abs().max()) <= 0.5
    assert torch.equal(_value("input"), _value("input")) and not torch.equal(_value("input"), _value("input", seed=2))
    other = initial_value(ParamSpec("b.weight", (64, 256), "replicated", "input", True, 2), CONFIG, 1)
    assert not torch.equal(_value("input"), other)
    with pytest.raises(ValueError, match="unknown initialiser role"):
        _value("magic")
