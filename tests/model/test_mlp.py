"""The MLP's forms are one function: packed or not, every backend, with adapters; and what a step keeps of it.

fp32 against fp64: 2e-6 of the norm.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megatron.model.mlp import ACTIVATIONS, MLP
from megatron.ops.packed_linear import are_adjacent
from tests.ops.fused_cases import relative


def filled(kind: str, activation: str, bias: bool = False) -> MLP:
    mlp = MLP(kind, 16, 24, activation, bias)
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in mlp.parameters():
            p.copy_(torch.randn(p.shape, generator=gen) * 0.3)
    return mlp


def gradients(mlp: MLP, backend: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype).requires_grad_()
    y = mlp(x, backend)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *mlp.parameters()])]


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("bias", [False, True])
def test_every_path_is_the_same_function(activation: str, bias: bool) -> None:
    """Names and values stay when the weights are put together; a bias keeps them apart."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("on a GPU machine kernels are compiled, not interpreted")
    exact = gradients(filled("gated", activation, bias).double(), "reference", torch.float64)
    for packed in (False, True):
        mlp = filled("gated", activation, bias)
        before = {name: p.clone() for name, p in mlp.state_dict().items()}
        if packed:
            mlp.pack_weights()
            assert are_adjacent([mlp.l1.weight, mlp.l2.weight]) is not bias
        assert all(torch.equal(p, before[name]) for name, p in mlp.state_dict().items())
        for backend in ("reference", "torch", "triton"):
            got = gradients(mlp, backend)
            assert max(relative(a, b) for a, b in zip(got, exact, strict=True)) < 2e-6


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of matrices of each packed product."""
    found: list[int] = []
    from megatron.model import mlp as module

    plain = module.packed_linear
    monkeypatch.setattr(module, "packed_linear", lambda x, w, *rest: found.append(len(w)) or plain(x, w, *rest))
    return found


def test_one_product_where_the_weights_lie_together(products: list[int]) -> None:
    """Not with weights apart, nor on the reference path, under autocast, or where a module is more than a matrix."""
    x = torch.randn(3, 16)
    mlp = filled("gated", "silu")
    mlp(x)
    mlp.pack_weights()
    mlp(x, "reference")
    with torch.autocast("cpu", torch.bfloat16):
        mlp(x)
    hook = mlp.l2.register_forward_hook(lambda module, given, y: 2 * y)
    assert products == []
    doubled = mlp(x)
    hook.remove()
    assert torch.allclose(doubled, 2 * mlp(x), atol=1e-6) and products == [2]
    mlp.l1 = nn.Sequential(mlp.l1)  # as an adapter's wrapper
    mlp(x)
    filled("plain", "silu")(x)
    assert products == [2]


def test_a_compiled_graph_has_two_products(products: list[int]) -> None:
    torch.compiler.reset()
    mlp = filled("gated", "silu")
    mlp.pack_weights()
    x = torch.randn(3, 16)
    compiled = torch.compile(mlp, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), mlp(x), atol=1e-6) and products == [2]


def test_a_training_step_keeps_the_projections_alone() -> None:
    """Per token: the input once and both halves of the width; before the last product, the product too."""
    mlp, stored = filled("gated", "silu"), {}
    mlp.pack_weights()
    weights = mlp.l1.weight.untyped_storage().data_ptr(), mlp.l3.weight.untyped_storage().data_ptr()

    def keep(x: Tensor) -> Tensor:
        stored[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        mlp(torch.randn(2, 5, 16, requires_grad=True))
    held = sum(size for place, size in stored.items() if place not in weights)
    assert held == 4 * 10 * (16 + 2 * 24 + 24)


def test_an_unknown_activation_is_refused() -> None:
    assert "silu" in ACTIVATIONS
    with pytest.raises(ValueError, match="unknown activation 'tanhh'"):
        MLP("gated", 4, 4, "tanhh", False)
