"""Fused Taylor attention against an independent recurrence in fp64, and that each case can fail; steps, strides, edges.

Relative norms of the outputs (y or sums, last state) and of all gradients. fp32: 2e-5. bf16: outputs 6e-3, gradients 4e-2. fp16
multiplies in tf32: outputs 1.5e-3, gradients 1e-2. On the CPU by Triton's interpreter, the same list on a GPU.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the fused kernels need Triton: pip install triton")

from megatron.engine.base import EngineSettings
from megatron.ops.taylor import feature_count, taylor, triton_launch
from megatron.ops.taylor.triton import taylor_step_in_place
from megatron.ops.tuning import taylor_cut
from tests.engine.engine_cases import model_config, train
from tests.ops.fused_cases import NO_GPU, boundaries, device_matrix, plant
from tests.ops.taylor_recurrence import recurrence
from tests.ops.triton_bf16 import emulate_bf16

LIMITS = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (6e-3, 4e-2), torch.float16: (1.5e-3, 1e-2)}


@dataclass(frozen=True)
class Case:
    """Batch, length, heads, widths of features and values, and what else the pass has.

    decay: rows of log_decay, 0 without. padding: share of padded tokens; the first ones of the first row always are.
    """

    b: int
    t: int
    h: int = 1
    f: int = 16
    v: int = 64
    state: bool = False
    documents: float = 0.0
    padding: float = 0.0
    decay: int = 0
    divide: bool = True

    def leaves(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        """q, k, v, and a state as an earlier text leaves it: its denominators are positive."""
        g = torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))

        def draw(t: int, n: int) -> Tensor:
            return torch.randn(self.b, t, self.h, n, generator=g, dtype=torch.float64)

        leaves = [draw(self.t, n).to(device, dtype) for n in (self.f, self.f, self.v)]
        if self.state:
            _, state = recurrence(draw(20, self.f), draw(20, self.f), draw(20, self.v))
            leaves.append(state.to(device, torch.float32))
        return [x.requires_grad_() for x in leaves]

    def extras(self, device: str) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """keep [b, t], log_decay, documents [b, t]."""
        keep = log_decay = None
        if self.padding:
            keep = (torch.rand(self.b, self.t, generator=torch.Generator().manual_seed(4)) >= self.padding).float().to(device)
            keep[0, : math.ceil(self.padding * self.t)] = 0
        if self.decay:
            rate = torch.log1p(-torch.exp2(-3.0 - torch.arange(self.h)))
            log_decay = (rate * torch.linspace(1, 2, self.decay * self.t).view(self.decay, self.t, 1)).to(device)
        return keep, log_decay, boundaries(self.b, self.t, device, self.documents) if self.documents else None


CASES = {
    "one token with a state": Case(1, 1, state=True),
    "one token per row": Case(3, 1),
    "a chunk less one": Case(1, 15),
    "a chunk and one": Case(1, 17, state=True),
    "several chunks": Case(1, 50),
    "documents": Case(1, 33, documents=0.1),
    "documents of two tokens": Case(1, 20, documents=0.5, state=True),
    "documents and a state": Case(1, 45, documents=0.06, state=True),
    "padding": Case(2, 18, padding=0.3),
    "padding and a state": Case(1, 30, state=True, padding=0.3),
    "decay": Case(1, 33, decay=1, state=True),
    "decay by row": Case(2, 18, 2, v=16, decay=2),
    "everything": Case(2, 20, 2, v=32, state=True, documents=0.1, padding=0.2, decay=1),
    "values of 33": Case(1, 20, v=33, state=True),
    "values of 48": Case(1, 20, v=48),
    "values of 112": Case(1, 18, v=112, state=True),
    "values of 128": Case(1, 33, v=128, decay=1, documents=0.05),
    "features of 8": Case(1, 33, f=8, v=32, state=True),
    "features of 7": Case(1, 18, f=7, v=20, documents=0.1),
    "features of 24": Case(1, 18, f=24, v=16, state=True),
    "sums": Case(1, 20, state=True, divide=False),
    "sums with everything": Case(1, 33, v=32, state=True, documents=0.06, padding=0.2, decay=1, divide=False),
}
FAST = ("one token with a state", "one token per row", "features of 7", "values of 33", "padding", "decay by row")
HALF = ("one token per row", "documents", "everything", "values of 33", "sums")


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted kernels cut a sequence every 16 tokens, so that short ones, which cost seconds, have several chunks."""
    if NO_GPU:
        monkeypatch.setattr(triton_launch, "taylor_cut", lambda v, form: replace(taylor_cut(v, form), chunk=16))


def on(device: str, case: Case) -> Case:
    """The case as it is for chunks of 16; about four times as long on a GPU, where they have up to 64 tokens."""
    return case if device == "cpu" else replace(case, t=4 * case.t - 3)


def run(case: Case, leaves: list[Tensor], exact: bool) -> list[Tensor]:
    """y (or sums), last state, and gradients of the leaves from fixed upstream gradients."""
    keep, log_decay, ids = case.extras("cpu" if exact else str(leaves[0].device))
    state = leaves[3] if case.state else None
    if exact:
        wide = (None if x is None else x.double() for x in (keep, log_decay))
        y, last = recurrence(*leaves[:3], state, *wide, ids)
        y = y[..., :-1] / (y[..., -1:] + 1e-12) if case.divide else y
    else:
        options: dict[str, Any] = {"keep": keep, "log_decay": log_decay, "segment_ids": ids, "divide": case.divide}
        y, last = taylor(*leaves[:3], state=state, backend="triton", **options)
    gen = torch.Generator().manual_seed(3)
    ups = [torch.randn(x.shape, generator=gen, dtype=torch.float64).to(x.device) for x in (y, last)]
    total = sum((x.double() * up).sum() for x, up in zip((y, last), ups, strict=True))
    return [y, last, *torch.autograd.grad(total, leaves)]


def relative(got: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of `exact`, at least 1: with one token and no state q has no gradient."""
    wide = exact.detach().cpu().double()
    return float((got.detach().cpu().double() - wide).norm() / wide.norm().clamp_min(1.0))


def errors(case: Case, dtype: torch.dtype, device: str) -> list[float]:
    """Relative norms, in the order of `run`."""
    if dtype == torch.bfloat16 and device == "cpu":
        emulate_bf16()
    leaves = case.leaves(dtype, device)
    want = run(case, [x.detach().cpu().double().requires_grad_() for x in leaves], exact=True)
    return [relative(a, b) for a, b in zip(run(case, leaves, exact=False), want, strict=True)]


def forward_error(case: Case) -> float:
    """The larger of the relative norms of y and the last state, in fp32 by the interpreter."""
    leaves, extras = [x.detach() for x in case.leaves(torch.float32, "cpu")], case.extras("cpu")
    options: dict[str, Any] = dict(zip(("keep", "log_decay", "segment_ids"), extras, strict=True))
    state = leaves[3] if case.state else None
    got = taylor(*leaves[:3], state=state, divide=False, backend="triton", **options)
    wide = (None if x is None else x.double() for x in (state, *extras))
    return max(relative(a, b) for a, b in zip(got, recurrence(*(x.double() for x in leaves[:3]), *wide), strict=True))


def all_cases() -> list[Any]:
    """Every case in fp32 and bf16, some in fp16; those that take the interpreter seconds are slow."""
    return [
        pytest.param(name, dtype, id=f"{name} {str(dtype)[6:]}", marks=() if name in FAST else pytest.mark.slow)
        for dtype in LIMITS
        for name in (HALF if dtype == torch.float16 else CASES)
    ]


@device_matrix
@pytest.mark.parametrize(("name", "dtype"), all_cases())
def test_outputs_and_gradients(device: str, name: str, dtype: torch.dtype) -> None:
    found = errors(on(device, CASES[name]), dtype, device)
    outputs, gradients = LIMITS[dtype]
    assert max(found[:2]) <= outputs and max(found[2:]) <= gradients, found


def test_the_plain_form_is_the_recurrence() -> None:
    """Two texts of one formula, in fp64."""
    for name in ("everything", "features of 7"):
        case = CASES[name]
        leaves = [x.detach().double() for x in case.leaves(torch.float32, "cpu")]
        keep, log_decay, ids = (None if x is None else x.double() for x in case.extras("cpu"))
        state = leaves[3] if case.state else None
        options: dict[str, Any] = {"state": state, "keep": keep, "log_decay": log_decay, "segment_ids": ids, "divide": False}
        plain = taylor(*leaves[:3], backend="reference", **options)
        exact = recurrence(*leaves[:3], state, keep, log_decay, ids)
        assert max(relative(a, b) for a, b in zip(plain, exact, strict=True)) < 1e-12


@device_matrix
def test_half_precision_stays_finite_where_squared_scores_leave_its_range(device: str) -> None:
    """q.k / 4 of 3,600 squared is 1.3e7, and a state sums features of 225."""
    leaves = [torch.full((1, 40, 1, n), 30.0, device=device, dtype=torch.float16).requires_grad_() for n in (16, 16, 32)]
    y, last = taylor(*leaves, backend="triton")
    gradients = torch.autograd.grad(y.float().mean(), leaves)
    assert all(x.isfinite().all() for x in (y, last, *gradients)) and (y - 30).abs().max() < 0.1


FORWARD, BACKWARD = "kernels", "backward_kernels"
FAULTS = {
    "a token does not see itself": (FORWARD, "oc[:, None] >= oc[None, :]", "oc[:, None] > oc[None, :]"),
    "nor in the backward": (BACKWARD, "oc[:, None] >= oc[None, :]", "oc[:, None] > oc[None, :]"),
    "the state is not carried": (FORWARD, "uu.to(DT), s, input", "uu.to(DT), 0.0 * s, input"),
    "the denominator is rounded": (FORWARD, "d += tl.sum(phi * z", "d += tl.sum(phi * z.to(tl.float16).to(tl.float32)"),
    "rows are too close": (FORWARD, "q + row[:, None] * sq", "q + row[:, None] * F"),
    "padding is counted": (FORWARD, "keep + row, mask=here, other=0.0)", "keep + row, mask=here, other=0.0) + 1.0"),
    "documents run into each other": (FORWARD, "tl.where(ids == before, enter, 0.0)", "enter"),
    "the state decays too little": (FORWARD, "s = s * (carry * tl.exp(whole))", "s = s * carry"),
    "what a token adds decays too much": (FORWARD, "below * tl.exp(whole - running)", "below * tl.exp(whole)"),
    "a gradient skips the last ring": (BACKWARD, "range(0, E, BE)", "range(0, E - BE, BE)"),
}
SEEN_BY = [
    *(("a token does not see itself", name) for name in CASES),
    ("nor in the backward", "features of 7"),
    ("the state is not carried", "values of 33"),
    ("the denominator is rounded", "values of 33"),
    ("rows are too close", "decay by row"),
    ("padding is counted", "padding"),
    ("documents run into each other", "everything"),
    ("the state decays too little", "decay"),
    ("what a token adds decays too much", "decay by row"),
    ("a gradient skips the last ring", "values of 33"),
]


@pytest.mark.skipif(not NO_GPU, reason="the interpreter sees them sooner")
@pytest.mark.parametrize(
    ("fault", "name"), [pytest.param(*pair, marks=() if pair[1] in FAST else pytest.mark.slow) for pair in SEEN_BY]
)
def test_a_planted_fault_is_seen(fault: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case fails with a kernel that is wrong by one word."""
    plant(triton_launch, *FAULTS[fault], tmp_path, monkeypatch)
    forward = FAULTS[fault][0] == FORWARD
    found = forward_error(CASES[name]) if forward else max(errors(CASES[name], torch.float32, "cpu"))
    assert not found <= LIMITS[torch.float32][0]


@device_matrix
@pytest.mark.parametrize(("f", "v"), [(16, 64), (8, 33)])
@pytest.mark.parametrize("decay", [False, True])
def test_decode_step_in_place_with_slots(device: str, f: int, v: int, decay: bool) -> None:
    """From pages with something else between them; only the rows of the slots change."""
    g = torch.Generator().manual_seed(0)
    b, h, e = 2, 3, feature_count(f)
    _, states = recurrence(*(torch.randn(5, 9, h, n, generator=g, dtype=torch.float64) for n in (f, f, v)))
    size = h * e * (v + 1)
    pool = torch.full((5, size + 21), 7.0, device=device)[:, 5 : 5 + size].unflatten(1, (h, e, v + 1))
    pool.copy_(states)
    q, k, x = (torch.randn(b, 1, h, n, generator=g, dtype=torch.float64) for n in (f, f, v))
    rate = torch.log1p(-torch.exp2(-3.0 - torch.arange(h))) if decay else None
    slots, others, before = torch.tensor([4, 1]), [0, 2, 3], pool.clone()
    on_device = (t[:, 0].float().to(device) for t in (q, k, x))
    y = taylor_step_in_place(*on_device, pool, None if rate is None else rate.to(device), slots.to(device))
    sums, want = recurrence(
        q, k, x, before.cpu().double()[slots], None, None if rate is None else rate.double().expand(1, 1, h)
    )
    assert relative(y, sums[:, 0, :, :-1] / sums[:, 0, :, -1:]) < 1e-6 and relative(pool[slots.to(device)], want) < 1e-6
    assert not pool.is_contiguous() and torch.equal(pool[others], before[others])


@device_matrix
def test_a_state_of_another_layout_is_refused(device: str) -> None:
    q, v = torch.randn(2, 1, 16, device=device), torch.randn(2, 1, 8, device=device)
    for state in (torch.zeros(2, 1, 153, 9, device=device, dtype=torch.bfloat16), torch.zeros(1, 1, 153, 9, device=device)):
        with pytest.raises(ValueError, match="state"):
            taylor_step_in_place(q, q, v, state)


@device_matrix
def test_reads_columns_of_one_projection(device: str) -> None:
    """Inputs whose tokens lie further apart, and gradients of which one is expanded from a single number."""
    g = torch.Generator().manual_seed(0)
    packed = torch.randn(2, 20, 2 * (16 + 16 + 24), generator=g).to(device).requires_grad_()
    parts = [x.unflatten(-1, (2, -1)) for x in packed.split([32, 32, 48], -1)]
    (got,) = torch.autograd.grad(taylor(*parts, backend="triton")[0].sum(), packed)
    (want,) = torch.autograd.grad(taylor(*parts, backend="reference")[0].sum(), packed)
    assert relative(got, want) < 2e-5


@device_matrix
@pytest.mark.parametrize("divide", [True, False])
def test_passes_without_tokens_or_rows(device: str, divide: bool) -> None:
    for b, t in ((2, 0), (0, 5)):
        leaves = [torch.randn(b, t, 2, n, device=device).requires_grad_() for n in (16, 16, 8)]
        state = torch.ones(b, 2, 153, 9, device=device, requires_grad=True)
        y, last = taylor(*leaves, state=state, divide=divide, backend="triton")
        assert y.shape == (b, t, 2, 8 if divide else 9) and torch.equal(last, state)
        gradients = torch.autograd.grad(y.sum() + 2 * last.sum(), [*leaves, state])
        assert torch.equal(gradients[3], torch.full_like(state, 2)) and all(x.numel() == 0 for x in gradients[:3])


@device_matrix
def test_a_row_without_a_token_is_zero_and_has_no_gradient(device: str) -> None:
    leaves = [torch.randn(2, 20, 1, n, device=device).requires_grad_() for n in (16, 16, 8)]
    keep = torch.tensor([[1.0], [0.0]], device=device).expand(2, 20)
    y, last = taylor(*leaves, keep=keep, backend="triton")
    assert y[1].abs().max() == 0 and last[1].abs().max() == 0
    gradients = torch.autograd.grad(y.sum() + last.sum(), leaves)
    assert all(x.isfinite().all() and x[1].abs().max() == 0 for x in gradients)


@device_matrix
def test_a_state_that_alone_is_used_has_its_gradients(device: str) -> None:
    leaves = [torch.randn(1, 20, 1, n, device=device).requires_grad_() for n in (16, 16, 8)]
    got, want = (
        torch.autograd.grad(taylor(*leaves, backend=backend)[1].pow(2).sum(), leaves[1:]) for backend in ("triton", "torch")
    )
    assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < 2e-5


@device_matrix
@pytest.mark.parametrize(("f", "v", "dtype"), [(33, 8, torch.float32), (4, 130, torch.float32), (4, 8, torch.float64)])
def test_heads_that_the_kernels_do_not_take_run_on_the_plain_path(device: str, f: int, v: int, dtype: torch.dtype) -> None:
    leaves = [torch.randn(1, 5, 1, n, device=device, dtype=dtype) for n in (f, f, v)]
    for a, b in zip(taylor(*leaves, backend="triton"), taylor(*leaves, backend="torch"), strict=True):
        assert torch.equal(a, b)


@device_matrix
def test_custom_operators_are_whole(device: str) -> None:
    """Schema, fake tensors and autograd registration, as torch's own checker sees them."""
    leaves = [torch.randn(1, 5, 1, n, device=device, requires_grad=True) for n in (16, 16, 8)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for divide in (True, False):
        arguments = (*leaves, torch.ones(1, 5, device=device), None, None, None, divide)
        torch.library.opcheck(torch.ops.linear_neox.taylor_forward.default, arguments, test_utils=checks)


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU, reason="no CUDA device; the cases above run interpreted")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_on_a_gpu_is_that_of_the_plain_path(dtype: str) -> None:
    """Three steps of a small Based model through the engine: fp32 to 1e-4 (tf32 products), bf16 to 2e-2."""
    settings = EngineSettings(dtype=dtype, gradient_accumulation=2)
    config = replace(model_config(), layer_types=("based",) * 4)
    plain, fused = (
        train(1, 1, "single", replace(settings, kernel_backend=backend), config, 3)["losses"] for backend in ("torch", "triton")
    )
    assert all(abs(a - b) <= (1e-4 if dtype == "fp32" else 2e-2) * a for a, b in zip(plain, fused, strict=True)), (plain, fused)
