"""Operators, models and their training steps as one compiled or exported graph, with the numbers of the eager ones.

Everything is compared in fp64, where only the order of sums differs: 1e-9 of the norm. The compiler's own kernels (`inductor`)
are used once; the other tests trace and differentiate as it does and run the operators one by one.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from megatron.layers.base import Context
from megatron.model.loss import token_loss
from megatron.ops.opaque import opaque
from megatron.ops.precision import outside_autocast
from tests.ops.fused_cases import mostly_slow, relative, results
from tests.ops.operator_cases import CASES, EXTRAS, Draw
from tools.bench.compile_cpu import KINDS, TOY, distance, gradients, step_of, toy

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1e-9
WHOLE = {"fullgraph": True, "backend": "aot_eager"}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compiler.reset()
        yield


def close(got: list[Tensor], exact: list[Tensor]) -> bool:
    return max(relative(a, b) for a, b in zip(got, exact, strict=True)) < LIMIT


def tokens_of(b: int, s: int) -> Tensor:
    return torch.randint(0, 64, (b, s), generator=torch.Generator().manual_seed(s))


FAST = [(case, "documents" if case == "metala" else "padding", 37) for case in CASES]
SLOW = [(case, extras, t) for case in CASES for extras in EXTRAS for t in (1, 37, 150) if (case, extras, t) not in FAST]


@mostly_slow("case,extras,t", FAST, SLOW)
def test_operators_are_one_node(case: str, extras: str, t: int) -> None:
    """Outputs and every gradient, that of the initial state included, at one token, a chunk's part and several chunks."""
    leaves, run = CASES[case](t, torch.float64, extras)
    leaves = [x.double().requires_grad_() for x in leaves]
    assert close(results(torch.compile(run, **WHOLE), leaves), results(run, leaves))


@mostly_slow("case", ["metala", "prefix_taylor"], ["taylor", "selective_scan", "conv"])
def test_only_the_gradients_that_are_asked_for_are_formed(case: str) -> None:
    leaves, run = CASES[case](9, torch.float64, "plain")
    for i in range(len(leaves)):
        given = [x.double().requires_grad_(i == n) for n, x in enumerate(leaves)]
        grads = [
            torch.autograd.grad(sum(y.sum() for y in f(*given)), given[i])[0]
            if any(y.requires_grad for y in f(*given))
            else None
            for f in (torch.compile(run, **WHOLE), run)
        ]
        assert (grads[0] is None) == (grads[1] is None)
        assert grads[0] is None or relative(grads[0], grads[1]) < LIMIT


@pytest.mark.parametrize("half", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_operators_under_autocast_and_compiled(case: str, half: torch.dtype) -> None:
    """The same bits as eager: mixed formats go through the operators as they are."""
    leaves, run = CASES[case](37, half, "documents")
    leaves = [x.requires_grad_() for x in leaves]

    def autocast(*given: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", half):
            return run(*given)

    for a, b in zip(results(torch.compile(autocast, **WHOLE), leaves), results(autocast, leaves), strict=True):
        assert a.dtype == b.dtype and (case == "conv" or torch.equal(a, b))
        assert relative(a, b) < 2.0**-8  # the convolution is sums of plain products, in another order


def test_the_loss_is_one_graph() -> None:
    logits = Draw()(2, 300, 50, dtype=torch.float64).requires_grad_()
    labels, mask = torch.randint(0, 50, (2, 300)), torch.rand(2, 300)
    labels[0, :7] = -100
    run = lambda x: (token_loss(x, labels, mask),)  # noqa: E731
    assert close(results(torch.compile(run, **WHOLE), [logits]), results(run, [logits]))


def fast_and_slow(fast: tuple[str, ...], kinds: tuple[str, ...] = tuple(KINDS)) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kind", [k if k in fast else pytest.param(k, marks=pytest.mark.slow) for k in kinds])


def single_layers(kind: str) -> nn.Module:
    """The model of a kind in fp64 with one layer of each of its mixers: tracing costs seconds a layer."""
    mixers = tuple(dict.fromkeys(KINDS[kind].get("layer_types", TOY.layer_types)))
    with mock.patch.dict(KINDS, {kind: {**KINDS[kind], "layer_types": mixers, "num_layers": len(mixers)}}):
        return toy(kind).double()


@fast_and_slow((), ("metala", "mamba", "based", "jrt", "alibi"))  # every mixer
def test_a_training_step_is_one_graph_at_any_length(kind: str) -> None:
    """Forward, loss and backward; a length that varies takes one graph, be it marked or noticed from the second batch on."""
    model = single_layers(kind)
    counted = CompileCounterWithBackend("aot_eager")
    step = torch.compile(step_of(model), fullgraph=True, backend=counted)
    marked = kind != "metala"
    for s in (300, 211) if marked else (64, 300, 211):
        tokens = tokens_of(2, s + 1)
        if marked:
            torch._dynamo.maybe_mark_dynamic(tokens, 1)
        assert distance(gradients(model, step(tokens)), gradients(model, step_of(model)(tokens))) < LIMIT
    assert counted.frame_count == (1 if marked else 2)


@fast_and_slow(("metala",), ("metala", "based", "jrt", "hybrid"))  # every mixer
def test_padding_documents_and_states_stay_in_the_graph(kind: str) -> None:
    """A pass that goes on from a state, padded on the left, and one of several documents; the states that come out too.

    The graph goes through AOTAutograd once here; every operator does above, and all kinds of states in
    `tests/export/test_compiled.py` (`test_with_a_cache`).
    """
    model, tokens = single_layers(kind), tokens_of(2, 20)
    mask = torch.ones(2, 20)
    mask[1, :6] = 0
    ids = (torch.arange(20) > 8).long().expand(2, 20)

    def run(tokens: Tensor) -> list[Tensor]:
        y, state = model(tokens, Context(mask=mask), model.init_state(2, torch.float64))
        more, last = model(tokens, Context(), state)
        apart, _ = model(tokens, Context(segment_ids=ids))
        one, after = model.step(tokens[:, 0], last)
        return [y * mask[..., None], more, apart, one, *(x.double() for s in after for x in s.values())]

    with torch.no_grad():
        backend = "aot_eager" if kind == "metala" else "eager"
        exact, got = run(tokens), torch.compile(run, fullgraph=True, backend=backend)(tokens)
    assert max(float((a - b).abs().max()) for a, b in zip(got, exact, strict=True)) < 1e-8


class Logits(nn.Module):
    """A model as `torch.export` takes it: tensors in, one tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)[0]


@fast_and_slow(("hybrid",), ("hybrid", "based", "jrt", "metala_untied"))  # every mixer
def test_export_serves_every_batch_and_length(kind: str) -> None:
    """Saved and loaded again; lengths on both sides of where eager changes its form."""
    model = Logits(single_layers(kind))
    shortest = 9 if kind == "jrt" else 2  # a prefix of 8 tokens, and one behind it
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=shortest, max=4096)}
    program = torch.export.export(model, (tokens_of(2, 64),), dynamic_shapes=(sizes,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for b, s in ((1, shortest), (3, 15), (2, 300)):
        assert close([loaded(tokens_of(b, s))], [model(tokens_of(b, s))])


@pytest.mark.slow
def test_inductor_agrees_as_far_as_fp32_goes() -> None:
    """Its distance from eager is within a few times eager's own from fp64."""
    model, tokens = toy("hybrid"), tokens_of(2, 65)
    eager = gradients(model, step_of(model)(tokens))
    got = gradients(model, torch.compile(step_of(model), fullgraph=True)(tokens))
    exact = gradients(model.double(), step_of(model)(tokens))
    assert distance(got, eager) < 5 * distance(eager, exact)


@pytest.mark.parametrize("name", ["metala", "chunked_scan", "taylor_scan", "prefix_state", "selective_scan"])
def test_custom_operators_are_whole(name: str) -> None:
    """Their schema, their fake results and their registered gradients, as torch's own checker sees them."""
    draw = Draw()
    q, v, state = draw(2, 7, 2, 4), draw(2, 7, 2, 6), draw(2, 2, 4, 6)
    ids = torch.zeros(2, 7, dtype=torch.long)
    given: dict[str, tuple[Any, ...]] = {
        "metala": (q, q + 1, v, v + 1, draw(2, 4), state, ids),
        "chunked_scan": (q, q + 1, v, -q.abs(), state, None, 0.5),
        "taylor_scan": (q, q + 1, v, torch.ones(2, 7), None, ids, None, True),
        "prefix_state": (q, v, torch.ones(2, 7)),
        "selective_scan": (draw(2, 7, 6), draw(2, 7, 6).abs(), -draw(6, 3).exp(), draw(2, 7, 3), draw(2, 7, 3), None, None),
    }
    values = tuple(x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given[name])
    torch.library.opcheck(getattr(torch.ops.linear_neox, name).default, values)


@outside_autocast
class _Doubled(torch.autograd.Function):
    @staticmethod
    def like(x: Tensor) -> Tensor:
        return x.new_empty(x.shape)

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x if float(x.sum()) == 0 else 2 * x  # a number decides, and a result may be the input itself

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 2 * dy


def test_a_second_copy_gets_a_name_of_its_own() -> None:
    """As two exported folders in one process, or one beside the trainer."""
    first, second = opaque("doubled", _Doubled), opaque("doubled", _Doubled)
    run: Callable[[Tensor], Tensor] = lambda x: first(second(x))  # noqa: E731
    x = torch.ones(3, requires_grad=True)
    for f in (run, torch.compile(run, **WHOLE)):
        assert torch.equal(f(x), 4 * x) and torch.equal(torch.autograd.grad(f(x).sum(), x)[0], torch.full((3,), 4.0))
    assert hasattr(torch.ops.linear_neox, "doubled") and hasattr(torch.ops.linear_neox, "doubled_2")
    zero = torch.zeros(3)
    assert torch.compile(run, **WHOLE)(zero).data_ptr() != zero.data_ptr()


@pytest.mark.slow
def test_a_path_is_chosen_while_the_compiler_traces() -> None:
    """Import of a fused path, table and log line are no part of the graph; in a process that has run nothing before."""
    pytest.importorskip("triton")
    code = (
        "import logging, sys, torch\n"
        "logging.basicConfig(level='INFO')\n"
        "from megatron.ops.metala import metala_packed\n"
        "assert 'megatron.ops.metala.triton' not in sys.modules and 'torch._dynamo' not in sys.modules\n"
        "f = torch.compile(lambda p, w: metala_packed(p, w, backend='triton')[0], fullgraph=True, backend='aot_eager')\n"
        "print(f(torch.randn(1, 5, 192), torch.randn(2, 16)).shape)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "operator metala: triton path (asked for by kernel_backend)" in done.stderr


def test_a_second_derivative_is_refused() -> None:
    leaves, run = CASES["metala"](5, torch.float64, "plain")
    given = [x.double().requires_grad_() for x in leaves]
    once = torch.autograd.grad(run(*given)[0].square().sum(), given[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()
