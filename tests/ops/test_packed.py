"""The packed projection and the operator over it: as the four separate ones in fp64, in one piece, with no new name or copy.

fp32 limits as in test_metala_triton.py: 1e-5 of the norm.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="the fused kernels need Triton: pip install triton")

from megatron.layers.base import Context
from megatron.layers.metala import MetaLA
from megatron.model.build import build_model, param_specs
from megatron.model.config import ModelConfig
from megatron.model.init import init_weights
from megatron.ops.metala import metala_packed
from megatron.ops.metala.inputs import cut_packed
from megatron.ops.packed_linear import joined_rows, pack_weights, packed_linear
from megatron.ops.packed_linear.triton import packed_linear_forward
from megatron.parallel.shard_spec import slice_of
from tests.ops.fused_cases import boundaries, device_matrix, mostly_slow, relative, results


def draw(*shapes: tuple[int, ...], device: str = "cpu") -> list[Tensor]:
    g = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(*s, generator=g, dtype=torch.float64).to(device, torch.float32).requires_grad_() for s in shapes]


@device_matrix
@mostly_slow("extras", [True], [False])
def test_operator_over_a_packed_projection(device: str, extras: bool) -> None:
    """Forward, the one packed gradient, dw and dstate; with documents, padding and a state; an odd width."""
    b, t, h, k, v = 2, 40, 2, 24, 48
    leaves = draw((b, t, h * (2 * k + 2 * v)), (h, k), (b, h, k, v), device=device)
    ids = boundaries(b, t, device) if extras else None
    mask = torch.ones(b, t, device=device) if extras else None
    if mask is not None:
        mask[1, :9] = 0

    def run(backend: str, packed: Tensor, w: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        y, last = metala_packed(packed, w, state=state, mask=mask, segment_ids=ids, backend=backend)
        return (y if mask is None else y * mask[..., None, None], last)

    exact = results(lambda *x: run("reference", *x), [x.detach().double().requires_grad_() for x in leaves])
    got = results(lambda *x: run("triton", *x), leaves)
    assert got[2].shape == leaves[0].shape
    assert max(relative(a, b) for a, b in zip(got, exact, strict=True)) < 1e-5


@device_matrix
def test_packed_linear_and_its_gradients(device: str) -> None:
    leaves = draw((2, 5, 8), (4, 8), (6, 8), (3, 8), (3,), device=device)

    def run(backend: str, x: Tensor, *rest: Tensor) -> list[Tensor]:
        return [packed_linear(x, rest[:3], rest[3], backend)]

    exact = results(lambda *x: run("reference", *x), [x.detach().double().requires_grad_() for x in leaves])
    for backend in ("torch", "triton"):
        got = results(lambda *x: run(backend, *x), leaves)  # noqa: B023
        assert max(relative(a, b) for a, b in zip(got, exact, strict=True)) < 1e-6


@device_matrix
def test_packed_operators_are_whole(device: str) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    x, a, b, bias = draw((2, 5, 8), (4, 8), (6, 8), (6,), device=device)
    torch.library.opcheck(packed_linear_forward, (x, [a, b], bias), test_utils=checks)
    from megatron.ops.metala.triton import metala_packed_forward

    packed, w, state = draw((1, 9, 2 * 96), (2, 16), (1, 2, 16, 32), device=device)
    torch.library.opcheck(metala_packed_forward, (packed, w, state, None, None, 0, True), test_utils=checks)


def test_weights_that_lie_together_are_read_in_place() -> None:
    parameters = [torch.nn.Parameter(torch.randn(n, 8)) for n in (4, 6, 3)]
    before = [p.detach().clone() for p in parameters]
    assert joined_rows(parameters).data_ptr() != parameters[0].data_ptr()
    pack_weights(parameters)
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    joined = joined_rows(parameters)
    assert joined.data_ptr() == parameters[0].data_ptr() and torch.equal(joined, torch.cat(before))
    apart = [*parameters[:2], torch.nn.Parameter(before[2].clone())]
    assert torch.equal(joined_rows(apart), torch.cat(before))
    assert torch.equal(joined_rows(parameters[::-1]), torch.cat(before[::-1]))
    pack_weights([torch.nn.Parameter(torch.empty(2, 2, device="meta"))])  # nothing to move, nothing to fail


def test_tensors_without_memory_pass() -> None:
    """The dry run measures a model on fake tensors, which have no addresses."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with FakeTensorMode():
            x, *weights = (torch.randn(*shape, requires_grad=True) for shape in ((2, 8), (4, 8), (6, 8)))
            y = packed_linear(x, weights, None, "torch")
            y.sum().backward()
        assert y.shape == (2, 10) and weights[1].grad.shape == (6, 8)


def test_a_layer_is_the_same_layer_on_both_paths() -> None:
    """Names, values, gradients of every parameter; padding included. fp32 on both sides: 1e-5."""
    layer = MetaLA(MetaLA.Config(hidden_size=64, num_heads=2))
    names = [n for n, _ in layer.named_parameters()]
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    x, mask = torch.randn(2, 20, 64, generator=g), torch.ones(2, 20)
    mask[0, :4] = 0
    found = []
    for together, backend in ((False, "reference"), (False, "torch"), (False, "triton"), (True, "torch"), (True, "triton")):
        if together:
            layer.pack_weights()
        y, _ = layer(x, Context(mask=mask, backend=backend))
        y = y * mask[..., None]
        found.append([y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
    assert [n for n, _ in layer.named_parameters()] == names
    assert sorted(layer.state_dict()) == sorted(names)
    for other in found[1:]:
        assert max(relative(a, b) for a, b in zip(other, found[0], strict=True)) < 1e-5


@pytest.mark.slow
def test_model_of_the_fused_path_traces_as_one_graph() -> None:
    """`torch.compile(fullgraph=True)` would stop at anything that it cannot keep, a Python branch on an address included."""
    config = ModelConfig(32, 32, 1, 2, 48, ("metala",))
    with torch.device("meta"):
        model = build_model(config)
    specs = param_specs(config)
    slices = lambda spec: slice_of(spec.shape, spec.cut, 0, 1)  # noqa: E731
    init_weights(model, {n: n for n in specs}, specs, config, 1, slices=slices, device="cpu", dtype=torch.float32)
    tokens, ctx = torch.randint(0, 32, (1, 9)), Context(backend="triton")
    plain = model(tokens, ctx)[0]
    compiled = torch.compile(lambda t: model(t, ctx)[0], backend="aot_eager", fullgraph=True)(tokens)
    assert torch.allclose(plain, compiled, atol=1e-6)
    compiled.sum().backward()
    assert model.model.layers[0].token_mixer.q_proj.weight.grad is not None


def test_cut_takes_heads_and_widths_from_the_balance() -> None:
    packed = torch.arange(24.0).view(1, 1, 24)
    q, z, v, g = cut_packed(packed, torch.zeros(2, 2))
    assert [x.flatten().tolist() for x in (q, z)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [x.shape for x in (v, g)] == [(1, 1, 2, 4)] * 2 and v.flatten()[0] == 8
