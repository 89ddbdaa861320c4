"""The three forms of the gated scan are one function: values and gradients, odd lengths, states, boundaries, extreme gates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.ops.scan import empty_scan_state, gated_scan, gated_scan_step, scan_quadratic, scan_recurrent
from megatron.ops.scan.chunk import scan_chunked

FORMS: list[Callable[..., tuple[Tensor, Tensor]]] = [scan_quadratic, scan_chunked]
# fp64 sums of at most 200 terms of size O(10): rounding is below 1e-12, the issue asks for 1e-10
TOLERANCE = 1e-10


def draw(s: int, k: int = 8, v: int = 16, gate_mean: float = 0.0, seed: int = 0) -> dict[str, Tensor]:
    """Random leaves in fp64; decay from gate logits as MetaLA makes it."""
    g = torch.Generator().manual_seed(seed)
    b, h = 2, 3
    shapes = {"q": (b, s, h, k), "k": (b, s, h, k), "v": (b, s, h, v), "z": (b, s, h, k), "state": (b, h, k, v)}
    leaves = {n: torch.randn(*shape, generator=g, dtype=torch.float64) for n, shape in shapes.items()}
    leaves["z"] = leaves["z"] * 1.5 + gate_mean
    return {n: t.requires_grad_() for n, t in leaves.items()}


def run(
    form: Callable[..., tuple[Tensor, Tensor]], leaves: dict[str, Tensor], ids: Tensor | None, with_state: bool
) -> list[Tensor]:
    """Outputs and all gradients under fixed random output gradients."""
    o, final = form(
        leaves["q"], leaves["k"], leaves["v"], F.logsigmoid(leaves["z"]) / 16, scale=0.3,
        state=leaves["state"] if with_state else None, segment_ids=ids,
    )  # fmt: skip
    g = torch.Generator().manual_seed(9)
    total = sum((t * torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype)).sum() for t in (o, final))
    wanted = [leaves[n] for n in ("q", "k", "v", "z", *(["state"] if with_state else []))]
    return [o, final, *torch.autograd.grad(total, wanted)]


@pytest.mark.parametrize("s", [1, 15, 63, 64, 65, 200])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_forms_agree(s: int, documents: bool, with_state: bool) -> None:
    leaves = draw(s)
    ids = (torch.rand(2, s, generator=torch.Generator().manual_seed(4)) < 0.06).cumsum(1) if documents else None
    expected = run(scan_recurrent, leaves, ids, with_state)
    for form in FORMS:
        for a, b in zip(expected, run(form, leaves, ids, with_state), strict=True):
            assert (a - b).abs().max() <= TOLERANCE


@pytest.mark.parametrize("gate_mean", [4.0, 2.0, -4.0, -20.0])
def test_chunked_in_fp32_is_close_to_fp64_at_trained_and_extreme_gates(gate_mean: float) -> None:
    """Relative norm 1e-5: a few hundred fp32 operations per output, nothing lost to the exponents' range."""
    exact = draw(200, gate_mean=gate_mean)
    single = {n: t.detach().float().requires_grad_() for n, t in exact.items()}
    for a, b in zip(run(scan_recurrent, exact, None, True), run(scan_chunked, single, None, True), strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm() + 1e-12


def test_gates_that_nearly_reset_stay_finite_in_fp32() -> None:
    """z = -200 is a decay of e^-12.5 per token: the chunk shrinks and stays exact, nothing overflows."""
    leaves = draw(130, gate_mean=-200.0)
    single = {n: t.detach().float().requires_grad_() for n, t in leaves.items()}
    exact, got = run(scan_recurrent, leaves, None, True), run(scan_chunked, single, None, True)
    gate = 5  # its gradient is e^-12 of the terms it is summed from, so only its absolute error can be bounded
    for i, (a, b) in enumerate(zip(exact, got, strict=True)):
        assert (a - b).norm() <= (1e-5 if i == gate else 1e-5 * a.norm())


def test_gradcheck() -> None:
    leaves = draw(5, k=2, v=3)
    ids = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])

    def f(q: Tensor, k: Tensor, v: Tensor, z: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return scan_chunked(q, k, v, F.logsigmoid(z) / 16, scale=0.7, state=state, segment_ids=ids)

    assert torch.autograd.gradcheck(f, tuple(leaves.values()))


def test_prefill_in_pieces_equals_one_pass() -> None:
    leaves = {n: t.detach() for n, t in draw(150).items()}
    ld = F.logsigmoid(leaves["z"]) / 16
    whole, final = scan_chunked(leaves["q"], leaves["k"], leaves["v"], ld, scale=1.0)
    state, parts = None, []
    for a, b in ((0, 70), (70, 71), (71, 150)):
        o, state = scan_chunked(*(t[:, a:b] for t in (leaves["q"], leaves["k"], leaves["v"], ld)), scale=1.0, state=state)
        parts.append(o)
    assert (torch.cat(parts, 1) - whole).abs().max() <= TOLERANCE
    assert state is not None and (state - final).abs().max() <= TOLERANCE


def operands(s: int, rates: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Inputs of `gated_scan`; rates: decays per head, one for each of the 8 channels or a single one."""
    leaves = draw(s)
    gate = F.logsigmoid(leaves["z"][..., :rates].detach()) / 4
    given = {n: leaves[n].detach().to(dtype) for n in ("q", "k", "v")}
    return {n: t.requires_grad_() for n, t in {**given, "log_decay": gate}.items()}


@pytest.mark.parametrize("rates", [1, 8])
@pytest.mark.parametrize("documents", [False, True])
def test_paths_of_the_operator_agree(rates: int, documents: bool) -> None:
    """Reference and chunks, with padding, documents, an initial state, and one decay per head."""
    leaves, state = operands(90, rates), draw(1)["state"].detach().requires_grad_()
    mask = (torch.arange(90) >= 7).long().expand(2, -1).clone()
    mask[1, -5:] = 0
    ids = (torch.arange(90) // 31).expand(2, -1) if documents else None
    results = []
    for backend in ("reference", "torch", "auto"):
        o, after = gated_scan(**leaves, state=state, mask=mask, segment_ids=ids, backend=backend)
        total = (o * mask[..., None, None]).pow(2).sum() + after.sum()
        results.append([o, after, *torch.autograd.grad(total, [*leaves.values(), state])])
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            assert a.shape == b.shape and (a - b).abs().max() <= TOLERANCE * max(1.0, float(a.abs().max()))


def test_steps_continue_a_pass_of_the_operator() -> None:
    leaves = operands(40, 8)
    whole, last = gated_scan(**leaves)
    o, state = gated_scan(
        **{n: t[:, :33] for n, t in leaves.items()}, state=empty_scan_state(2, 3, 8, 16, torch.float64, "cpu")
    )
    parts = [o]
    for t in range(33, 40):
        before = state.clone()
        o, after = gated_scan_step(**{n: x[:, t] for n, x in leaves.items()}, state=state)
        assert torch.equal(state, before)
        parts.append(o.unsqueeze(1))
        state = after
    assert (torch.cat(parts, 1) - whole).abs().max() <= TOLERANCE and (state - last).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("b", "s"), [(0, 3), (2, 0)])
def test_nothing_leaves_the_state_as_it_is(b: int, s: int) -> None:
    q, k, v, decay = (torch.ones(b, s, 2, n, requires_grad=True) for n in (4, 4, 6, 4))
    state = torch.ones(b, 2, 4, 6, requires_grad=True)
    o, final = gated_scan(q, k, v, -decay, state=state)
    (o.sum() + final.sum()).backward()
    assert o.shape == v.shape and torch.equal(final, state) and state.grad is not None and state.grad.eq(1).all()


def test_padding_neither_adds_nor_decays() -> None:
    leaves = operands(20, 8)
    alone, end = gated_scan(**leaves)
    padded = {n: torch.cat([torch.full_like(t[:, :6], -2.0), t], 1) for n, t in leaves.items()}
    mask = (torch.arange(26) >= 6).float().expand(2, -1)
    o, after = gated_scan(**padded, mask=mask)
    assert (o[:, 6:] - alone).abs().max() <= TOLERANCE and (after - end).abs().max() <= TOLERANCE


def test_half_precision_comes_back_and_the_state_stays_wide() -> None:
    leaves = operands(70, 8, torch.bfloat16)
    o, state = gated_scan(**leaves)
    exact, _ = gated_scan(**{n: t.double() for n, t in leaves.items()})
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert (o.double() - exact).abs().max() <= 2**-8 * exact.abs().max(), "rounded once, at the end"
    step, _ = gated_scan_step(**{n: t[:, 0] for n, t in leaves.items()}, state=torch.zeros_like(state))
    assert torch.equal(step, o[:, 0])


def test_a_fused_path_is_asked_for_by_name() -> None:
    with pytest.raises(ValueError, match="kernel_backend 'triton' has no path for operator 'scan'"):
        gated_scan(**operands(4, 8), backend="triton")
