"""Mamba's own facts: sizes of the released models, options, initialiser roles. The scan is held by tests/ops/test_ssm.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron.layers.base import Context
from megatron.layers.mamba import Mamba
from megatron.model.build import param_specs
from megatron.model.config import ModelConfig
from megatron.model.init import initial_value


def make(d: int, **options: object) -> Mamba:
    return Mamba(Mamba.Config(hidden_size=d, num_heads=1, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("d", [1024, 2048])
def test_state_and_step_rank_of_the_released_models(d: int) -> None:
    with torch.device("meta"):
        layer = make(d)
    assert layer.dt_rank == d // 16 and layer.x_proj.weight.shape == (d // 16 + 32, 2 * d)
    assert dict(layer.state_size()) == {"ssm": 2 * d * 16, "conv": 3 * 2 * d}


@pytest.mark.parametrize(
    "options", [{"use_bias_in_linears": True}, {"use_bias_in_conv": False}, {"state_size": 4, "conv_width": 2, "dt_rank": 3}]
)
def test_forms_agree_with_options(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    layer = make(16, **options).double()
    x = torch.randn(2, 50, 16, dtype=torch.float64)
    results = []
    for backend in ("reference", "torch"):
        y, _ = layer(x, Context(backend=backend))
        results.append([y, *torch.autograd.grad(y.pow(2).sum(), list(layer.parameters()))])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-10 * max(1.0, float(a.detach().abs().max()))
    state = layer.init_state(2, x.dtype, "cpu")
    for t in range(50):
        y, state = layer.step(x[:, t], state, Context())
        assert (y - results[0][0][:, t]).abs().max() <= 1e-10


def test_biases_and_roles() -> None:
    layer = make(32, use_bias_in_linears=True)
    rules = layer.init_rules()
    assert rules["conv1d.bias"] == "uniform 0.5" and rules["A_log"] == "log_range" and rules["dt_proj.bias"] == "step_size"
    assert rules["in_proj.bias"] == "zeros" and set(layer.no_decay()) == {"A_log", "D"}


def test_initial_values_are_the_originals() -> None:
    """Spec 1.7 and 10.8: A from 1 to n, step sizes of 0.001 to 0.1, uniform matrices, the output smaller by depth."""
    config = ModelConfig(64, 64, 4, 1, 1, ("mamba",) * 4, mlp="none", norm="rmsnorm")
    specs = param_specs(config)
    values = {n.rpartition("token_mixer.")[2]: initial_value(s, config, 7) for n, s in specs.items() if "layers.1." in n}
    assert torch.allclose(values["A_log"].exp(), torch.arange(1.0, 17.0).expand(128, 16))
    steps = torch.nn.functional.softplus(values["dt_proj.bias"])
    assert float(steps.min()) >= 1e-3 * 0.99 and float(steps.max()) <= 0.1 * 1.01 and float(steps.median()) < 0.03
    bounds = {"in_proj.weight": 1 / 8, "x_proj.weight": 128**-0.5, "dt_proj.weight": 0.5, "conv1d.weight": 0.5}
    bounds |= {"conv1d.bias": 0.5, "out_proj.weight": 128**-0.5 / 2}
    for name, bound in bounds.items():
        assert 0.9 * bound < float(values[name].abs().max()) <= bound, name
    assert torch.equal(values["D"], torch.ones(128))
    assert not specs["model.layers.1.token_mixer.A_log"].decay and not specs["model.layers.1.token_mixer.D"].decay


def test_init_methods_hold_where_the_config_says_so() -> None:
    """GPT-NeoX draws the matrices of Mamba by its init methods, but that of the step sizes; all else is as it was."""
    config = ModelConfig(64, 256, 4, 1, 1, ("mamba",) * 4, mlp="none", norm="rmsnorm", init_method="small_init")
    neox = replace(config, output_init_method="single_residual_scaled_normal", mixer_init="methods")
    specs = {n.rpartition("token_mixer.")[2]: s for n, s in param_specs(config).items() if "layers.1.token_mixer" in n}
    own, drawn = ({n: initial_value(s, c, 7) for n, s in specs.items()} for c in (config, neox))
    spread = {"in_proj.weight": (2 / (5 * 256)) ** 0.5, "gate_proj.weight": (2 / (5 * 256)) ** 0.5}
    spread |= {"x_proj.weight": (2 / (5 * 256)) ** 0.5, "out_proj.weight": 0.02 / 4**0.5}
    for name in specs:
        if name in spread:
            assert abs(float(drawn[name].std()) / spread[name] - 1) < 0.02, name
            assert float(drawn[name].abs().max()) > 3 * spread[name], "not uniform"
        else:
            assert torch.equal(own[name], drawn[name]), name
