"""JRT's own facts: what the prefix sees, prefill and steps with one, left padding, filler in front, sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.layers.base import Context
from megatron.layers.jrt import PrefixBased, PrefixInputs


def make(d: int = 32, h: int = 2, **options: object) -> PrefixBased:
    torch.manual_seed(0)
    return PrefixBased(PrefixBased.Config(hidden_size=d, num_heads=h, **options)).double()  # type: ignore[arg-type]


def prefix(length: int, mask: Tensor | None = None) -> Context:
    return Context(inputs=(PrefixInputs(length, mask),))


def inputs(b: int = 2, s: int = 50, d: int = 32) -> Tensor:
    return torch.randn(b, s, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("d", "count"), [(1024, 3_932_160), (1792, 11_010_048)])
def test_parameter_count_of_the_released_models(d: int, count: int) -> None:
    with torch.device("meta"):
        assert PrefixBased(PrefixBased.Config(hidden_size=d, num_heads=16)).param_count() == count


def test_the_prefix_is_seen_by_all_and_the_rest_by_what_follows() -> None:
    layer, x = make(prefix_length=20), inputs().requires_grad_()
    y, _ = layer(x, Context())
    (early,) = torch.autograd.grad(y[:, 3].sum(), x, retain_graph=True)
    assert early[:, 4:20].abs().amax(-1).min() > 0 and early[:, 20:].abs().max() == 0
    (late,) = torch.autograd.grad(y[:, 30].sum(), x)
    assert late[:, :31].abs().amax(-1).min() > 0 and late[:, 31:].abs().max() == 0


@pytest.mark.parametrize("length", [1, 20, 49, 50, 60])
@pytest.mark.parametrize("filler", [False, True])
def test_forms_agree_for_any_prefix(length: int, filler: bool) -> None:
    """quadratic = chunked with gradients; then prefill + steps, whose state holds prefix and causal part."""
    layer, x = make(), inputs()
    hidden = (torch.arange(50) >= min(6, length - 1)).double().expand(2, 50) if filler else None
    results = []
    for backend in ("reference", "torch"):
        y, _ = layer(x, Context(backend=backend, inputs=(PrefixInputs(length, hidden),)))
        results.append([y, *torch.autograd.grad(y.pow(2).sum(), list(layer.parameters()))])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-10 * max(1.0, float(a.detach().abs().max()))
    start = min(length, 49)
    ctx = Context(inputs=(PrefixInputs(length, None if hidden is None else hidden[:, :start]),))
    y, state = layer(x[:, :start], ctx, layer.init_state(2, x.dtype, "cpu"))
    if length > start:  # a prompt shorter than the prefix is all prefix: only the causal form of the rest can follow
        return
    assert (y - results[0][0][:, :start]).abs().max() <= 1e-10
    pieces = [(start, min(start + 7, 50))]
    y, state = layer(x[:, slice(*pieces[0])], prefix(length), state)
    assert (y - results[0][0][:, slice(*pieces[0])]).abs().max() <= 1e-10, "a later pass is causal"
    for t in range(pieces[0][1], 50):
        y, state = layer.step(x[:, t], state, Context())
        assert (y - results[0][0][:, t]).abs().max() <= 1e-10


def test_left_padding_moves_the_prefix_along() -> None:
    layer, x = make(prefix_length=10), inputs(1, 20)
    alone, end = layer(x, Context(), layer.init_state(1, x.dtype, "cpu"))
    padded = torch.cat([torch.ones(1, 7, 32, dtype=x.dtype), x], 1)
    mask = (torch.arange(27) >= 7).float()[None]
    y, state = layer(padded, Context(mask=mask), layer.init_state(1, x.dtype, "cpu"))
    assert (y[:, 7:] - alone).abs().max() <= 1e-10
    assert state is not None and end is not None and (state["recurrent"] - end["recurrent"]).abs().max() <= 1e-10


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_documents_see_their_own_part_of_the_prefix(backend: str) -> None:
    layer, x = make(), inputs(1, 40)
    ids = torch.zeros(1, 40, dtype=torch.long)
    ids[:, 11:] += 1
    ids[:, 30:] += 1
    y, _ = layer(x, Context(segment_ids=ids, backend=backend, inputs=(PrefixInputs(20),)))
    for a, b, inside in ((0, 11, 11), (11, 30, 9), (30, 40, 0)):
        want, _ = layer(x[:, a:b], prefix(inside))
        assert (y[:, a:b] - want).abs().max() <= 1e-10


def test_filler_keeps_its_values_and_the_constant_as_released() -> None:
    """Keys of filler are zero, so p = 1: it still adds its value with weight 1, twice inside the prefix (spec 2.4)."""
    layer, x = make(h=1), inputs(1, 3)
    hidden = torch.tensor([[0.0, 1.0, 1.0]], dtype=torch.float64)
    y, _ = layer(x, prefix(3, hidden))
    q, k, v, k2, v2 = (p(x[0]) for p in (layer.proj_q, layer.proj_k, layer.proj_v, layer.proj_k_enc, layer.proj_v_enc))
    k, k2 = k * hidden[0, :, None], k2 * hidden[0, :, None]

    def p(a: Tensor, b: Tensor) -> Tensor:
        s = (a * b).sum() / 4
        return 1 + s + s * s / 2

    pairs = [(p(q[1], k[j]), v[j]) for j in range(2)] + [(p(q[1], k2[j]), v2[j]) for j in range(3)]
    want = sum(w * u for w, u in pairs) / sum(w for w, _ in pairs)
    assert (layer.out_proj(want) - y[0, 1]).abs().max() < 1e-12


def test_refusal() -> None:
    with pytest.raises(ValueError, match="divisible by its heads"):
        make(heads=5)
