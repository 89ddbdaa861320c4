"""Based's own facts: sizes of the released models, heads of its own, the fixed decay and its gate, tensor parallelism of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.layers.base import Context
from megatron.layers.based import Based


def make(d: int = 32, h: int = 4, **options: object) -> Based:
    torch.manual_seed(0)
    return Based(Based.Config(hidden_size=d, num_heads=h, **options)).double()  # type: ignore[arg-type]


def inputs(s: int = 40, d: int = 32) -> Tensor:
    return torch.randn(2, s, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("d", "count", "state"), [(1024, 2_621_440, 16 * 153 * 65), (1792, 7_340_032, 16 * 153 * 113)])
def test_parameter_count_and_state_of_the_released_models(d: int, count: int, state: int) -> None:
    """Counts of spec 1.2; the state is the packed one: 153 rows per head instead of 273."""
    with torch.device("meta"):
        layer = Based(Based.Config(hidden_size=d, num_heads=16))
        decayed = Based(Based.Config(hidden_size=d, num_heads=16, decay=True))
    assert layer.param_count() == count and decayed.param_count() == count + 16 * d
    assert dict(layer.state_size()) == {"recurrent": state}


@pytest.mark.parametrize("options", [{"decay": True}, {"heads": 8, "feature_width": 6}, {"decay": True, "decay_const": -5.0}])
def test_forms_agree_with_options(options: dict[str, object]) -> None:
    """quadratic = chunked = prefill + steps in fp64, gradients included."""
    layer, x = make(**options), inputs()
    results = []
    for backend in ("reference", "torch"):
        y, _ = layer(x, Context(backend=backend))
        results.append([y, *torch.autograd.grad(y.pow(2).sum(), list(layer.parameters()))])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-10 * max(1.0, float(a.detach().abs().max()))
    _, state = layer(x[:, :17], Context(), layer.init_state(2, x.dtype, "cpu"))
    assert state is not None
    for t in range(17, 40):
        y, state = layer.step(x[:, t], state, Context())
        assert (y - results[0][0][:, t]).abs().max() <= 1e-10


def test_decay_is_one_minus_a_power_of_two_per_head() -> None:
    rates = make(decay=True).log_decay(torch.device("cpu"))
    assert rates is not None
    assert (rates.exp() - torch.tensor([0.875, 0.9375, 0.96875, 0.984375])).abs().max() < 1e-7
    assert make().log_decay(torch.device("cpu")) is None


def test_padding_does_not_decay() -> None:
    layer, x = make(decay=True), inputs(20)
    alone, _ = layer(x, Context())
    padded = torch.cat([torch.ones(2, 7, 32, dtype=x.dtype), x], 1)
    mask = (torch.arange(27) >= 7).float().expand(2, 27)
    y, _ = layer(padded, Context(mask=mask))
    assert (y[:, 7:] - alone).abs().max() <= 1e-10
    holed = torch.cat([x[:, :9], torch.ones(2, 4, 32, dtype=x.dtype), x[:, 9:]], 1)
    mask = ((torch.arange(24) < 9) | (torch.arange(24) >= 13)).float().expand(2, 24)
    y, _ = layer(holed, Context(mask=mask))
    assert (y[:, 13:] - alone[:, 9:]).abs().max() <= 1e-10


def test_ranks_have_the_decay_of_their_own_heads() -> None:
    whole = make(decay=True, heads=8)
    part = make(decay=True, heads=8)
    assert part.decay_proj is not None
    part.decay_proj.weight = torch.nn.Parameter(part.decay_proj.weight[4:])
    part.decay_proj.out_features = 4  # as `parallel/tensor.py` sets it
    part.set_shard(1, 2)
    rates, all_rates = part.log_decay(torch.device("cpu")), whole.log_decay(torch.device("cpu"))
    assert rates is not None and all_rates is not None and torch.equal(rates, all_rates[4:])


def test_refusal() -> None:
    with pytest.raises(ValueError, match="divisible by its heads"):
        make(heads=5)
