"""What every registered token mixer must answer: causality, steps = pass, padding, documents, plan, costs.

A new mixer is covered by its name in the registry; nothing is edited here. `tests/layers/test_<name>.py` holds what is its own.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from megatron.layers.base import Context, Layer
from megatron.registry import layer_class, layer_info, layer_names, layer_options

NAMES = layer_names()
B, S, D, H = 2, 70, 32, 2
TOLERANCE = 1e-10  # fp64; sums over 70 tokens of values of size O(10)


def make(name: str) -> Layer:
    """A mixer in fp64 with every parameter random, so that nothing passes by being zero."""
    layer: Layer = layer_class(name).build({"hidden_size": D, "num_heads": H, "layer_index": 1}, {}).double()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) * (1.0 if p.dim() == 1 else p.shape[-1] ** -0.5))
    return layer


def inputs(b: int = B, s: int = S) -> Tensor:
    return torch.randn(b, s, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(params=NAMES)
def layer(request: pytest.FixtureRequest) -> Layer:
    return make(request.param)


def test_reads_the_past_only(layer: Layer) -> None:
    x = inputs().requires_grad_()
    y, _ = layer(x, Context())
    (grad,) = torch.autograd.grad(y[:, 40].sum(), x)
    assert grad[:, 41:].abs().max() == 0 and grad[:, 40].abs().max() > 0


def test_reference_path_equals_default_with_gradients(layer: Layer) -> None:
    results = []
    for backend in ("reference", "auto"):
        x = inputs().requires_grad_()
        y, _ = layer(x, Context(backend=backend))
        results.append([y, *torch.autograd.grad(y.pow(2).sum(), [x, *layer.parameters()])])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= TOLERANCE * max(1.0, float(a.detach().abs().max()))


@pytest.mark.parametrize("cuts", [[70], [1, 70], [33, 70], [2, 5, 66, 70]])
def test_prefill_in_pieces_then_steps_equal_the_full_pass(layer: Layer, cuts: list[int]) -> None:
    x = inputs()
    whole, _ = layer(x, Context())
    state, parts, start = layer.init_state(B, x.dtype, "cpu"), [], 0
    for end in cuts[:-1]:
        y, state = layer(x[:, start:end], Context(), state)
        parts.append(y)
        start = end
    for t in range(start, S):
        y, state = layer.step(x[:, t], state, Context())
        parts.append(y.unsqueeze(1))
    assert (torch.cat(parts, 1) - whole).abs().max() <= TOLERANCE


def test_states_that_come_in_are_not_changed(layer: Layer) -> None:
    x = inputs()
    _, state = layer(x[:, :9], Context(), layer.init_state(B, x.dtype, "cpu"))
    before = {name: t.clone() for name, t in state.items()}
    layer(x[:, 9:20], Context(), state)
    layer.step(x[:, 9], state, Context())
    assert all(torch.equal(before[name], t) for name, t in state.items())
    assert all(t.shape[0] == B for t in state.values())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_equals_no_padding(layer: Layer, side: str) -> None:
    x = inputs(1, 20)
    alone, end = layer(x, Context(), layer.init_state(1, x.dtype, "cpu"))
    junk = torch.full((1, 7, D), 3.0, dtype=x.dtype)
    padded = torch.cat([junk, x] if side == "left" else [x, junk], 1)
    mask = torch.ones(1, 27)
    at = slice(7, None) if side == "left" else slice(0, 20)
    mask[:, [i for i in range(27) if i not in range(27)[at]]] = 0
    y, state = layer(padded, Context(mask=mask), layer.init_state(1, x.dtype, "cpu"))
    assert (y[:, at] - alone).abs().max() <= TOLERANCE
    after = layer.step(x[:, 3], state, Context())[0] - layer.step(x[:, 3], end, Context())[0]
    assert after.abs().max() <= TOLERANCE


def test_documents_are_kept_apart(layer: Layer) -> None:
    x = inputs(1)
    ids = torch.zeros(1, S, dtype=torch.long)
    ids[:, 13:] += 1
    ids[:, 64:] += 1
    y, _ = layer(x, Context(segment_ids=ids))
    for a, b in ((0, 13), (13, 64), (64, S)):
        assert (y[:, a:b] - layer(x[:, a:b], Context())[0]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("length", [1, 2, 40])
def test_what_follows_documents_continues_the_last_one(layer: Layer, length: int) -> None:
    """Also where it is shorter than a convolution's taps or a window: nothing of the document before it is in the state."""
    x = inputs()
    ids = (torch.arange(S - 1) >= S - 1 - length).long().expand(B, -1)
    _, state = layer(x[:, :-1], Context(segment_ids=ids), layer.init_state(B, x.dtype, "cpu"))
    _, alone = layer(x[:, S - 1 - length : -1], Context(), layer.init_state(B, x.dtype, "cpu"))
    assert state is not None and alone is not None
    y, _ = layer.step(x[:, -1], state, Context())
    want, _ = layer.step(x[:, -1], alone, Context())
    assert (y - want).abs().max() <= TOLERANCE


def test_plan_and_rules_name_every_parameter(layer: Layer) -> None:
    names = {name for name, _ in layer.named_parameters()}
    assert set(layer.plan()) == names and set(layer.init_rules()) == names
    assert set(layer.no_decay()) <= names


class Meeting(torch.nn.Module):
    """Stands in a `join`: the ranks are threads, and each gets the sum of what all bring. Sums are made in rank order."""

    def __init__(self, barrier: threading.Barrier, parts: dict[int, Tensor], rank: int) -> None:
        super().__init__()
        self.barrier, self.parts, self.rank = barrier, parts, rank

    def forward(self, y: Tensor) -> Tensor:
        self.parts[self.rank] = y
        self.barrier.wait(30)
        total = torch.stack([self.parts[r] for r in sorted(self.parts)]).sum(0)
        self.barrier.wait(30)
        return total


@pytest.mark.parametrize("size", [2])
def test_parts_by_plan_sum_to_the_whole(layer: Layer, size: int) -> None:
    """Ranks that hold their own heads and meet where the layer says `join` are the layer: the maths knows nothing of ranks."""
    from megatron.model.init import cut
    from megatron.parallel.plan import slice_of
    from megatron.parallel.tensor import set_part_sizes

    x = inputs()
    whole, _ = layer(x, Context())
    barrier, parts = threading.Barrier(size), dict[int, Tensor]()

    def run(rank: int) -> Tensor:
        part = make(layer.names[0])
        part.first_head = rank * H // size
        for name, p in list(part.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            piece = cut(p.data, slice_of(tuple(p.shape), layer.plan()[name], rank, size))  # type: ignore[arg-type]
            setattr(part.get_submodule(owner), leaf, torch.nn.Parameter(piece))
        set_part_sizes(part)
        for module in list(part.modules()):
            if "join" in module._modules:
                module.join = Meeting(barrier, parts, rank)
        return part(x, Context())[0]

    with ThreadPoolExecutor(size) as ranks:
        for y in ranks.map(run, range(size)):
            assert (y - whole).abs().max() <= TOLERANCE


def test_costs(layer: Layer) -> None:
    assert layer.flops(128) > 0 and layer.flops(4096) >= layer.flops(128)
    assert layer.param_count() == sum(p.numel() for p in layer.parameters())
    made = layer.init_state(1, torch.float32, "cpu")
    assert dict(layer.state_size()) == {name: t.numel() for name, t in made.items()}


@pytest.mark.parametrize("name", NAMES)
def test_registered_without_import_equals_the_class(name: str) -> None:
    cls = layer_class(name)
    assert name in cls.names and layer_info(name).class_name == cls.__name__
    options = layer_options()[cls.names[0]]
    made = cls.Config(hidden_size=D, num_heads=H)
    assert {f: o.default for f, o in options.items()} == {f: getattr(made, f) for f in options}
    assert all(o.doc for o in options.values()), "every option has a sentence after its field"


@pytest.mark.parametrize("name", NAMES)
def test_every_mixer_has_a_test_that_names_it(name: str) -> None:
    from pathlib import Path

    stem = layer_info(name).module.rpartition(".")[2]
    assert (Path(__file__).parent / f"test_{stem}.py").exists()
