"""Operators under autocast: the same numbers as without it on the inputs that it rounds, in the region and after it.

Inputs are mixed as autocast makes them: projections in bf16 or fp16; vectors, weights of convolutions, rates, states in fp32.
Inside an operator autocast is off, so results and gradients are bitwise identical; distances from fp64 are those of one
rounding of what comes out: 2^-8 (bf16) or 2^-11 (fp16) of it.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron.model.linear_loss import linear_token_loss
from megatron.ops.attention import Places, Rule, attention
from megatron.ops.conv import causal_conv, conv_step_torch
from megatron.ops.metala import metala_packed, metala_step
from megatron.ops.packed_linear import packed_linear
from megatron.ops.precision import outside_autocast
from megatron.ops.scan import scan_quadratic, scan_recurrent
from megatron.ops.selective_scan import selective_step
from megatron.ops.taylor import taylor, taylor_step
from megatron.ops.taylor.prefix import prefix_taylor
from tests.ops.fused_cases import relative
from tests.ops.operator_cases import CASES, EXTRAS, Draw, Run

ROOT = Path(__file__).resolve().parents[2]
HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def scaled(outputs: tuple[Tensor, ...], factor: float = 1.0) -> Tensor:
    """One number of all outputs, times a loss scale, formed in fp32 at least."""
    generator = torch.Generator().manual_seed(3)
    wide = [x if x.dtype == torch.float64 else x.float() for x in outputs]
    return sum((x * torch.randn(x.shape, generator=generator)).sum() for x in wide) * factor  # type: ignore[return-value]


def differentiated(leaves: list[Tensor], run: Run, forward: bool, backward: bool, half: torch.dtype) -> list[Tensor]:
    """Outputs and gradients with autocast on in either half."""
    given = [x.detach().requires_grad_() for x in leaves]
    with torch.autocast("cpu", half, enabled=forward):
        outputs = run(*given)
    with torch.autocast("cpu", half, enabled=backward):
        return [*outputs, *torch.autograd.grad(scaled(outputs), given)]


@HALVES
@pytest.mark.parametrize("t", [1, 37, 150])
@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("case", CASES)
def test_operators_are_the_same_inside_and_outside(case: str, extras: str, t: int, half: torch.dtype) -> None:
    leaves, run = CASES[case](t, half, extras)
    plain = differentiated(leaves, run, False, False, half)
    for forward, backward in ((True, False), (True, True), (False, True)):
        got = differentiated(leaves, run, forward, backward, half)
        assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True)), (forward, backward)
    gradients = plain[-len(leaves) :]
    assert [g.dtype for g in gradients] == [x.dtype for x in leaves]
    assert all(bool(x.isfinite().all()) for x in plain)
    exact = differentiated([x.double() for x in leaves], run, False, False, half)
    off = [relative(a, b) for a, b in zip(plain, exact, strict=True)]
    assert max(off) < 4 * ROUNDING[half], off


@pytest.mark.parametrize("case", CASES)
def test_a_scaled_fp16_loss_scales_gradients(case: str) -> None:
    """As GradScaler does: the backward after the region, of a loss times 2^10; fp16 gradients lose no digits by it."""
    leaves, run = CASES[case](37, torch.float16, "plain")
    given = [x.detach().requires_grad_() for x in leaves]
    with torch.autocast("cpu", torch.float16):
        outputs = run(*given)
    plain = torch.autograd.grad(scaled(outputs), given, retain_graph=True)
    for got, want in zip(torch.autograd.grad(scaled(outputs, 1024.0), given), plain, strict=True):
        assert bool(got.isfinite().all()) and relative(got.double() / 1024, want) < 2 * ROUNDING[torch.float16]


def _steps(half: torch.dtype) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Decode steps and forms for reading, as functions of nothing; those promise fp32 too."""
    draw = Draw()
    q, z = draw(2, 2, 4, dtype=half), draw(2, 2, 4, dtype=half)
    v, g, state = draw(2, 2, 8, dtype=half), draw(2, 2, 8, dtype=half), draw(2, 2, 4, 8)
    w, taylor_state = draw(2, 4), draw(2, 2, 15, 9).abs()
    wide = [draw(2, 9, 2, 4), draw(2, 9, 2, 4), draw(2, 9, 2, 8), -draw(2, 9, 2, 4).exp()]
    u, a, b = draw(2, 6, dtype=half), -draw(6, 3).exp(), draw(2, 3, dtype=half)
    weight, window = draw(6, 1, 4), draw(2, 3, 6, dtype=half)
    return {
        "metala_step": lambda: metala_step(q, z, v, g, w, state),
        "taylor_step": lambda: taylor_step(q, z, v, taylor_state, torch.tensor([-0.1, -0.2])),
        "selective_step": lambda: selective_step(u, u.float().abs(), a, b, b, draw(2, 6, 3)),
        "scan_recurrent": lambda: scan_recurrent(*wide, scale=0.5),
        "scan_quadratic": lambda: scan_quadratic(*wide, scale=0.5),
        "taylor reference": lambda: taylor(wide[0], wide[1], wide[2], backend="reference"),
        "prefix reference": lambda: prefix_taylor(
            wide[0], wide[1], wide[2], wide[1], wide[2], torch.ones(2, 9), backend="reference"
        ),
        "conv_step": lambda: (conv_step_torch(u, weight, window.clone()),),
    }


@HALVES
@pytest.mark.parametrize("name", list(_steps(torch.float32)))
def test_steps_and_forms_for_reading_keep_their_formats(name: str, half: torch.dtype) -> None:
    plain = _steps(half)[name]()
    with torch.autocast("cpu", half):
        got = _steps(half)[name]()
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, plain, strict=True))
    assert name != "conv_step" or got[0].dtype == half


@HALVES
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_packed_linear_is_a_linear_to_autocast(backend: str, half: torch.dtype) -> None:
    """fp32 weights and input: the product in half, gradients back in fp32, also where the backward stands in the region."""
    if backend == "triton":
        pytest.importorskip("triton")
    draw = Draw()
    leaves = [draw(2, 5, 8), draw(4, 8), draw(6, 8), draw(6)]

    def run(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (packed_linear(x, [a, b], bias, backend),)

    plain = differentiated(leaves, run, False, False, half)
    outside = differentiated(leaves, run, True, False, half)
    assert outside[0].dtype == half and all(g.dtype == torch.float32 for g in outside[1:])
    assert max(relative(a, b) for a, b in zip(outside, plain, strict=True)) < 4 * ROUNDING[half]
    after = differentiated(leaves, run, False, True, half)
    assert all(torch.equal(a, b) for a, b in zip(after, plain, strict=True))


@HALVES
@pytest.mark.parametrize("t", [1, 9, 70])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_an_attention_to_autocast(t: int, masked: bool, half: torch.dtype) -> None:
    """As on rounded inputs without autocast, bit by bit: slopes too, which one part of 8 bits would spoil."""
    draw = Draw()
    leaves = [draw(2, t, 2, 8) for _ in range(3)]
    count = torch.arange(t).expand(2, t)
    hidden = count < t // 3
    places = Places(count, count.masked_fill(hidden, -1)) if masked else None
    rule = Rule(8**-0.5, 20, torch.tensor([0.3, 0.07]))

    def run(q: Tensor, k: Tensor, v: Tensor, backend: str = "torch") -> tuple[Tensor, ...]:
        y = attention(q, k, v, rule, places, backend=backend)
        return (y.masked_fill(hidden[..., None, None], 0) if masked else y,)

    got = differentiated(leaves, run, True, False, half)
    assert got[0].dtype == half and torch.equal(got[0], run(*(x.to(half) for x in leaves))[0])
    exact = differentiated([x.double() for x in leaves], lambda *x: run(*x, backend="reference"), False, False, half)
    for a, b in zip(got, exact, strict=True):
        assert (a.double() - b).norm() < 8 * ROUNDING[half] * (b.norm() + 1)


@HALVES
def test_the_fused_output_loss_follows_autocast(half: torch.dtype) -> None:
    draw = Draw()
    leaves, labels = [draw(2, 7, 8), draw(20, 8)], torch.arange(14).view(2, 7)
    run = lambda x, matrix: (linear_token_loss(x, matrix, labels, None),)  # noqa: E731
    plain = differentiated(leaves, run, False, False, half)
    for backward in (False, True):
        got = differentiated(leaves, run, True, backward, half)
        assert [x.dtype for x in got] == [torch.float32] * 3
        assert max(relative(a, b) for a, b in zip(got, plain, strict=True)) < 4 * ROUNDING[half]


@pytest.mark.parametrize("op", ["metala", "conv"])
def test_kernels_do_not_see_autocast(op: str) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("on a GPU machine kernels are compiled, not interpreted")
    leaves, _ = CASES[op](9, torch.bfloat16, "plain")
    leaves = [torch.randn(1, 9, 2 * 96), torch.randn(2, 16), torch.randn(1, 2, 16, 32)] if op == "metala" else leaves[:3]
    run: Run = (
        (lambda packed, w, state: metala_packed(packed, w, state=state, backend="triton"))
        if op == "metala"
        else (lambda x, w, history: (causal_conv(x, w, history=history, backend="triton"),))
    )
    plain = differentiated(leaves, run, False, False, torch.bfloat16)
    for backward in (False, True):
        got = differentiated(leaves, run, True, backward, torch.bfloat16)
        assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


def own_functions() -> list[tuple[str, str]]:
    """(module, class) of every subclass of torch.autograd.Function in the package."""
    found = []
    for path in sorted((ROOT / "megatron").rglob("*.py")):
        module, text = ".".join(path.relative_to(ROOT).with_suffix("").parts), path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "Function" in text else ():
            if isinstance(node, ast.ClassDef) and any(ast.unparse(b).split(".")[-1] == "Function" for b in node.bases):
                found.append((module, node.name))
    return found


@pytest.mark.parametrize(("module", "name"), own_functions())
def test_every_autograd_function_declares_its_autocast_behaviour(module: str, name: str) -> None:
    function = getattr(importlib.import_module(module), name)
    assert issubclass(function, torch.autograd.Function)
    for half in (function.forward, function.backward):
        assert getattr(half, "outside_autocast", False), f"{module}.{name} does not say what autocast does inside of it"


def test_every_custom_operator_declares_the_autocast_behaviour_of_its_backward() -> None:
    """Functions given to `register_autograd` in the files of fused paths."""
    for path in sorted((ROOT / "megatron" / "ops").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        declared = {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "outside_autocast" for d in node.decorator_list)
        }
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func).endswith("register_autograd")]
        if path.stem != "opaque":  # its backward calls that of an autograd function
            assert {ast.unparse(c.args[0]) for c in calls} <= declared, path.name


def test_the_declaration_acts() -> None:
    """What it guards against: a product inside of an undeclared function is rounded."""
    a = torch.randn(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert (lambda x: x @ x)(a).dtype == torch.bfloat16
        assert outside_autocast(lambda x: x @ x)(a).dtype == torch.float32
