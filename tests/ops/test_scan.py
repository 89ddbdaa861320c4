"""The three forms of the gated scan are one function: values and gradients, odd lengths, states, borders, extreme gates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.ops.chunk import scan_chunked
from megatron.ops.scan import scan_quadratic, scan_recurrent

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
