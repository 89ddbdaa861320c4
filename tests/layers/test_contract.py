"""Checks of the twelve clauses of the contract in `megatron/layers/base.py` on every registered token mixer.

A new mixer is covered by its name in the registry; nothing is edited here. `tests/layers/test_<name>.py` has its own tests.
`python tools/layer.py check NAME` prints the first line of each test, which begins with the number of the clause; checks
without a number are additional.
"""

from __future__ import annotations

import ast
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron.data.micro_batch import MicroBatch
from megatron.engine.base import EngineSettings
from megatron.engine.single_process import SingleProcessEngine
from megatron.export.hf import packed_sources
from megatron.interop.hf_classes import LINEAR
from megatron.layers.base import Context, Layer, LayerInputs, input_names, inputs_of
from megatron.model.config import ModelConfig
from megatron.model.init import cut
from megatron.parallel.shard_spec import cut_dim, slice_of
from megatron.parallel.tensor import set_part_sizes
from megatron.registry import layer_class, layer_info, layer_names, layer_options
from tests.parallel.context_cases import GATHER, LAYOUTS, RECOMPUTED, compare_layers, worst
from tests.parallel.ranks import run_ranks

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
    """2. Causality: no gradient of an output reaches a later token."""
    x = inputs().requires_grad_()
    y, _ = layer(x, Context())
    assert layer.two_way(Context()) == 0, "by default nothing is read in both directions"
    (grad,) = torch.autograd.grad(y[:, 40].sum(), x)
    assert grad[:, 41:].abs().max() == 0 and grad[:, 40].abs().max() > 0


def test_reference_path_equals_default_with_gradients(layer: Layer) -> None:
    """6. Backends: the reference path and the default one agree, gradients included."""
    results = []
    for backend in ("reference", "auto"):
        x = inputs().requires_grad_()
        y, _ = layer(x, Context(backend=backend))
        results.append([y, *torch.autograd.grad(y.pow(2).sum(), [x, *layer.parameters()])])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= TOLERANCE * max(1.0, float(a.detach().abs().max()))


@pytest.mark.parametrize("cuts", [[70], [1, 70], [33, 70], [2, 5, 66, 70]])
def test_prefill_in_pieces_then_steps_equal_the_full_pass(layer: Layer, cuts: list[int]) -> None:
    """3. Equivalence: a chunked prefill and subsequent steps equal the full pass."""
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
    """3. Equivalence: input states are not modified, and have the batch on dim 0."""
    x = inputs()
    _, state = layer(x[:, :9], Context(), layer.init_state(B, x.dtype, "cpu"))
    before = {name: t.clone() for name, t in state.items()}
    layer(x[:, 9:20], Context(), state)
    layer.step(x[:, 9], state, Context())
    assert all(torch.equal(before[name], t) for name, t in state.items())
    assert all(t.shape[0] == B for t in state.values())


def ordered(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Entries of a window by their places: a step in place leaves them where there was room."""
    if "places" not in state:
        return state
    order = state["places"].argsort(1)
    entries = {name: state[name].gather(1, order[..., None, None].expand_as(state[name])) for name in ("keys", "values")}
    return state | entries | {"places": state["places"].gather(1, order)}


def test_a_step_in_place_equals_one_that_is_not(layer: Layer) -> None:
    """3. Equivalence: a step that may overwrite its state gives the same output and state."""
    x = inputs()
    _, state = layer(x[:, :9], Context(), layer.init_state(B, x.dtype, "cpu"))
    own = {name: t.clone() for name, t in state.items()}
    y, after = layer.step(x[:, 9], state, Context())
    z, overwritten = layer.step(x[:, 9], own, Context(in_place=True))
    assert (y - z).abs().max() <= TOLERANCE and after.keys() == overwritten.keys() == state.keys()
    assert all((ordered(after)[name] - ordered(overwritten)[name]).abs().max() <= TOLERANCE for name in after)
    if layer.steps_by_slot:
        wide = {name: t.new_full((5, *t.shape[1:]), 7.0) for name, t in state.items()}
        slots = torch.tensor([3, 1])
        for name, t in state.items():
            wide[name][slots] = t
        z, overwritten = layer.step(x[:, 9], wide, Context(in_place=True, slots=slots))
        assert (y - z).abs().max() <= TOLERANCE and all(overwritten[name] is wide[name] for name in wide)
        for name, t in after.items():
            assert (wide[name][slots] - t).abs().max() <= TOLERANCE and (wide[name][[0, 2, 4]] == 7.0).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_equals_no_padding(layer: Layer, side: str) -> None:
    """4. Padding on either side changes neither outputs nor the state."""
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
    """5. Document masking: each document gives the same outputs as alone."""
    x = inputs(1)
    ids = torch.zeros(1, S, dtype=torch.long)
    ids[:, 13:] += 1
    ids[:, 64:] += 1
    y, _ = layer(x, Context(segment_ids=ids))
    for a, b in ((0, 13), (13, 64), (64, S)):
        assert (y[:, a:b] - layer(x[:, a:b], Context())[0]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("length", [1, 2, 40])
def test_what_follows_documents_continues_the_last_one(layer: Layer, length: int) -> None:
    """5. Document masking: the state contains only the last document, even if it is shorter than a window."""
    x = inputs()
    ids = (torch.arange(S - 1) >= S - 1 - length).long().expand(B, -1)
    _, state = layer(x[:, :-1], Context(segment_ids=ids), layer.init_state(B, x.dtype, "cpu"))
    _, alone = layer(x[:, S - 1 - length : -1], Context(), layer.init_state(B, x.dtype, "cpu"))
    assert state is not None and alone is not None
    y, _ = layer.step(x[:, -1], state, Context())
    want, _ = layer.step(x[:, -1], alone, Context())
    assert (y - want).abs().max() <= TOLERANCE


def test_plan_and_rules_name_every_parameter(layer: Layer) -> None:
    """9. Parameter tables: plan() and init_rules() name every parameter, no_decay() existing ones."""
    names = {name for name, _ in layer.named_parameters()}
    assert set(layer.plan()) == names and set(layer.init_rules()) == names
    assert set(layer.no_decay()) <= names


def test_moving_parameters_in_memory_changes_nothing(layer: Layer) -> None:
    """9. Parameter tables: pack_weights changes no value, no shape and no output."""
    x = inputs()
    before, (y, _) = {name: p.detach().clone() for name, p in layer.named_parameters()}, layer(x, Context())
    layer.pack_weights()
    after = dict(layer.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[name], p) for name, p in after.items())
    assert torch.equal(layer(x, Context())[0], y)


def test_cut_parameters_divide_by_the_declared_number(layer: Layer) -> None:
    """8. Tensor parallelism: the size of every sharded dimension is divisible by Config.tp_divisor()."""
    divisor = layer.config.tp_divisor()
    assert divisor >= 1
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    for name, how in layer.plan().items():
        dim = cut_dim(how)  # type: ignore[arg-type]
        assert dim is None or shapes[name][dim] % divisor == 0, f"{name} {shapes[name]} does not divide by {divisor}"


class Meeting(torch.nn.Module):
    """A `reduce_from_tp` over ranks that are threads: each gets the sum of all partial sums, added in rank order."""

    def __init__(self, barrier: threading.Barrier, parts: dict[int, Tensor], rank: int) -> None:
        super().__init__()
        self.barrier, self.parts, self.rank, self.calls = barrier, parts, rank, 0

    def forward(self, y: Tensor) -> Tensor:
        self.calls += 1
        self.parts[self.rank] = y
        self.barrier.wait(30)
        total = torch.stack([self.parts[r] for r in sorted(self.parts)]).sum(0)
        self.barrier.wait(30)
        return total


@pytest.mark.parametrize("size", [2])
def test_parts_by_plan_sum_to_the_whole(layer: Layer, size: int) -> None:
    """7, 8. Local sizes, tensor parallelism: shards add up to the unsharded layer, with the declared number of reductions."""
    x = inputs()
    whole, _ = layer(x, Context())
    barrier, parts = threading.Barrier(size), dict[int, Tensor]()

    def run(rank: int) -> tuple[Tensor, int]:
        part = make(layer.names[0])
        for name, p in list(part.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            piece = cut(p.data, slice_of(tuple(p.shape), layer.plan()[name], rank, size))  # type: ignore[arg-type]
            setattr(part.get_submodule(owner), leaf, torch.nn.Parameter(piece))
        set_part_sizes(part)
        part.set_shard(rank, size)
        meetings = []
        for module in list(part.modules()):
            if "reduce_from_tp" in module._modules:
                meetings.append(Meeting(barrier, parts, rank))
                module.reduce_from_tp = meetings[-1]
        y, _ = part(x, Context())
        return y, sum(meeting.calls for meeting in meetings)

    with ThreadPoolExecutor(size) as ranks:
        for y, sums in ranks.map(run, range(size)):
            assert (y - whole).abs().max() <= TOLERANCE
            assert sums == layer.tp_reductions, f"{sums} sums over the ranks, tp_reductions says {layer.tp_reductions}"


class Detach(torch.nn.Module):
    """A `copy_to_tp` or `reduce_from_tp` that no gradient passes."""

    def forward(self, y: Tensor) -> Tensor:
        return y.detach().requires_grad_()


def test_whole_parameters_stay_outside_of_the_cut_region(layer: Layer) -> None:
    """8. Tensor parallelism: a replicated parameter acts outside of `copy_to_tp` ... `reduce_from_tp`."""
    replicated = [name for name, how in layer.plan().items() if how == "replicated"]

    def reached(end: str) -> set[str]:
        """Parameters that have a gradient when nothing flows back through this end of the regions."""
        cut_off = make(layer.names[0])
        for module in list(cut_off.modules()):
            if end in module._modules:
                setattr(module, end, Detach())
        y, _ = cut_off(inputs(), Context())
        named = dict(cut_off.named_parameters())
        grads = torch.autograd.grad(y.pow(2).sum(), list(named.values()), allow_unused=True)
        return {name for name, grad in zip(named, grads, strict=True) if grad is not None}

    inside = (reached("copy_to_tp") - reached("reduce_from_tp")) & set(replicated)
    assert not inside, f"{sorted(inside)} would have a part of the gradient on each rank"


def test_inputs_of_its_own(layer: Layer) -> None:
    """10. Own inputs: inputs of only this mixer are fields of its `Inputs`, with defaults that mean "not given"."""
    own = {"mask", "segment_ids", "backend", "in_place", "slots", "attentions", "inputs", "cp"}
    assert {f.name for f in fields(Context)} == own
    others = {name for n in NAMES for name in input_names([make(n)]) if layer_class(n).Inputs is not layer.Inputs}
    assert not others & set(input_names([layer]))
    with pytest.raises(ValueError, match="an input of other mixers"):
        inputs_of([layer], {"of_no_mixer": 1})
    given = inputs_of([layer], dict.fromkeys(input_names([layer])))
    assert given == (() if layer.Inputs is None else (layer.Inputs(),))
    assert all(isinstance(kind, LayerInputs) for kind in given)
    x = inputs()
    assert torch.equal(layer(x, Context(inputs=given))[0], layer(x, Context())[0])


def test_random_numbers_are_declared(layer: Layer) -> None:
    """Dropout: a layer that draws random numbers in training declares it, and by default none does."""
    assert not layer.draws_random()
    if "dropout" not in {f.name for f in fields(layer.config)}:
        return
    dropping = layer_class(layer.names[0]).build({"hidden_size": D, "num_heads": H}, {"dropout": 0.5}).double().train()
    assert dropping.draws_random()
    x = inputs()
    assert not torch.equal(dropping(x, Context())[0], dropping(x, Context())[0])


def test_two_training_steps(layer: Layer) -> None:
    """Training: a model of two such blocks takes two optimizer steps, each of which lowers the loss of its batch."""
    config = ModelConfig(32, D, 2, H, 48, (layer.names[0],) * 2)
    engine = SingleProcessEngine(config, EngineSettings(micro_batch=2, seq_length=12, lr=1e-2), torch.device("cpu"))
    text = torch.randint(0, 32, (2, 13), generator=torch.Generator().manual_seed(0))
    batch = MicroBatch(text[:, :-1], text[:, 1:], torch.ones(2, 12), None, [0, 1])
    losses = [float(engine.train_step([batch], 1e-2).loss) for _ in range(2)]
    losses.append(engine.eval_loss([batch]).loss)
    assert losses[0] > losses[1] > losses[2] > 0


def test_its_text_can_be_packed(layer: Layer) -> None:
    """Export: its file and the operators that it calls can be packed into a folder without this package."""
    config = ModelConfig(32, D, 1, H, 48, (layer.names[0],))
    sources = packed_sources(config, LINEAR)
    trees = [ast.parse(text) for text in sources.values()]
    modules = {n.module or "" for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level}
    assert f"class {type(layer).__name__}(" in "".join(sources.values())
    assert not [name for name in modules if name.split(".")[0] in ("megatron", "triton")]


def test_costs(layer: Layer) -> None:
    """11. Costs: flops grow with the length, state_size and param_count equal measured counts."""
    assert layer.flops(128) > 0 and layer.flops(4096) >= layer.flops(128)
    assert layer.param_count() == sum(p.numel() for p in layer.parameters())
    made = layer.init_state(1, torch.float32, "cpu")
    assert dict(layer.state_size()) == {name: t.numel() for name, t in made.items()}


@pytest.mark.parametrize("name", NAMES)
def test_registered_without_import_equals_the_class(name: str) -> None:
    """1. Registration: names, options and defaults read from the source text are those of the class."""
    cls = layer_class(name)
    assert name in cls.names and layer_info(name).class_name == cls.__name__
    options = layer_options()[cls.names[0]]
    made = cls.Config(hidden_size=D, num_heads=H)
    assert {f: o.default for f, o in options.items()} == {f: getattr(made, f) for f in options}
    assert all(o.doc for o in options.values()), "every option has a sentence after its field"


@pytest.mark.parametrize("name", NAMES)
def test_every_mixer_has_a_test_that_names_it(name: str) -> None:
    """Tests: a mixer has its own test file."""
    stem = layer_info(name).module.rpartition(".")[2]
    assert (Path(__file__).parent / f"test_{stem}.py").exists()


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_shards_of_the_sequence_equal_the_whole(layer: Layer, size: int) -> None:
    """12. Context parallelism: on 2 and 4 ranks outputs and gradients are those of the whole row, recomputed too."""
    if not layer.context_parallel:
        pytest.skip("the mixer does not declare context_parallel")
    ways = {"layouts": LAYOUTS if size == 4 else ("crossing",), "ways": (GATHER, RECOMPUTED)}
    errors = worst(run_ranks(compare_layers, size, {"own": (layer.names[0], {})}, timeout=120, **ways))
    assert errors["own"] <= TOLERANCE
