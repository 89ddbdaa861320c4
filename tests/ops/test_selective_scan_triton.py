"""The fused selective scan against an independent recurrence in fp64, and that each case can fail.

Relative norms of the outputs (y, last state) and of all gradients. fp32: 2e-5. bf16: outputs 6e-3, gradients 4e-2; fp16 has
three more bits: 1.5e-3 and 1e-2. Chunks are of eight tokens here, so that short sequences have several; B, C and u are columns
of wider tensors, as the layer's projections make them. On a CPU the interpreter takes a second for a case: there only some are
in half precision.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the fused kernels need Triton: pip install triton")

from megatron.ops.selective_scan import selective_scan, triton_gate
from megatron.ops.selective_scan import triton as fused
from megatron.ops.selective_scan.operator import selective_step
from megatron.ops.selective_scan.triton_gate import scan_gate_fused
from tests.ops.fused_cases import NO_GPU, boundaries, device_matrix, plant, relative
from tests.ops.triton_bf16 import emulate_bf16

LIMITS = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (6e-3, 4e-2), torch.float16: (1.5e-3, 1e-2)}


@pytest.fixture(autouse=True)
def _chunks_of_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "CHUNK", 8)


def recurrence(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None, documents: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Algorithm 2 of the paper in fp64, channel by channel of the discretised system, from nothing else of this tree.

    u, dt [b, t, d]; a [d, n]; b, c [b, t, n]; state [b, d, n]; documents [b, t]. Returns y [b, t, d] and the last state.
    """
    h = torch.zeros(u.shape[0], *a.shape, dtype=torch.float64) if state is None else state
    outputs = []
    for t in range(u.shape[1]):
        if documents is not None and t > 0:
            h = torch.where((documents[:, t] != documents[:, t - 1])[:, None, None], torch.zeros_like(h), h)
        transition = torch.exp(torch.einsum("bd,dn->bdn", dt[:, t], a))
        h = transition * h + torch.einsum("bd,bn->bdn", dt[:, t] * u[:, t], b[:, t])
        outputs.append(torch.einsum("bdn,bn->bd", h, c[:, t]))
    return torch.stack(outputs, 1), h


@dataclass(frozen=True)
class Case:
    """Batch, length, channels, states per channel; what else the pass has. `speed`: mean of the log of the step sizes."""

    b: int
    t: int
    d: int
    n: int
    state: bool = True
    documents: float = 0.0
    left_padding: int = 0
    parts: int = 1
    speed: float = -1.0

    def leaves(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        """u, dt, b, c in `dtype`; A and the state in fp32."""
        g = torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))
        b, t, d, n = self.b, self.t, self.d, self.n
        u, dt, x, y, a, state = (
            torch.randn(*s, generator=g, dtype=torch.float64)
            for s in ((b, t, d), (b, t, d), (b, t, n), (b, t, n), (d, n), (b, d, n))
        )
        dt = (dt + self.speed).exp()
        if self.left_padding:
            dt[0, : self.left_padding] = 0
        leaves = [x.to(device, dtype) for x in (u, dt, x, y)] + [x.to(device, torch.float32) for x in (-a.exp(), state)]
        return [x.requires_grad_() for x in leaves[: 6 if self.state else 5]]

    def ids(self, device: str) -> Tensor | None:
        """Document numbers [b, t]."""
        return boundaries(self.b, self.t, device, self.documents) if self.documents else None


CASES = {
    "one token with a state": Case(1, 1, 8, 16),
    "one token per row": Case(3, 1, 8, 16, state=False),
    "a chunk less one": Case(1, 7, 8, 16),
    "a chunk and one": Case(1, 9, 8, 16),
    "no initial state": Case(2, 10, 8, 16, state=False),
    "documents": Case(1, 13, 8, 16, documents=0.2),
    "a document per token": Case(1, 6, 8, 16, documents=1.0),
    "five states": Case(1, 9, 8, 5),
    "64 states": Case(1, 5, 8, 64),
    "blocks of channels": Case(1, 6, 19, 16),
    "a wide tile": Case(1, 5, 21, 8),
    "three parts": Case(1, 22, 8, 16, parts=3),
    "parts and documents": Case(1, 31, 8, 16, documents=0.1, parts=4),
    "padding on the left": Case(2, 10, 8, 16, left_padding=4),
    "fast decay": Case(1, 12, 8, 16, speed=3.0),
    "slow decay": Case(1, 12, 8, 16, speed=-6.0),
}
FAST = ("one token with a state", "a chunk and one", "documents")
HALF = {torch.bfloat16: ("one token with a state", "documents", "slow decay"), torch.float16: ("a chunk and one",)}


def run(case: Case, leaves: list[Tensor], exact: bool) -> list[Tensor]:
    """y, last state, and gradients of the leaves, from fixed upstream gradients."""
    u, dt, b, c, a = leaves[:5]
    state = leaves[5] if case.state else None
    if exact:
        y, last = recurrence(u, dt, a, b, c, state, case.ids("cpu"))
    else:
        ub, uc = torch.cat([u, b], 2), torch.cat([c, u, c], 2)
        columns = uc[..., case.n : case.n + case.d], ub[..., case.d :], uc[..., case.n + case.d :]
        y, last = fused.selective_scan_fused(columns[0], dt, a, *columns[1:], state, case.ids(str(u.device)))
    gen = torch.Generator().manual_seed(3)
    ups = [torch.randn(x.shape, generator=gen, dtype=torch.float64).to(x.device) for x in (y, last)]
    total = sum((x.double() * up).sum() for x, up in zip((y, last), ups, strict=True))
    return [y, last, *torch.autograd.grad(total, leaves)]


def errors(case: Case, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Relative norms, in the order of `run`."""
    if dtype == torch.bfloat16 and device == "cpu":
        emulate_bf16()
    monkeypatch.setattr(fused, "parts_for", lambda programs, chunks: min(case.parts, chunks))
    leaves = case.leaves(dtype, device)
    want = run(case, [x.detach().cpu().double().requires_grad_() for x in leaves], exact=True)
    return [relative(a, b) for a, b in zip(run(case, leaves, exact=False), want, strict=True)]


def all_cases() -> Iterator[Any]:
    """(device, case, format): on a GPU every case in every format, in the interpreter those named above."""
    gpu = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU, reason="no CUDA device")]
    interpreted = pytest.mark.skipif(not NO_GPU, reason="on a GPU machine kernels are compiled, not interpreted")
    for dtype in LIMITS:
        for name in CASES:
            label = f"{name} {str(dtype)[6:]}"
            yield pytest.param("cuda", name, dtype, id=f"{label} cuda", marks=gpu)
            if name in HALF.get(dtype, CASES):
                slow = [] if name in FAST and dtype == torch.float32 else [pytest.mark.slow]
                yield pytest.param("cpu", name, dtype, id=f"{label} cpu", marks=[interpreted, *slow])


@pytest.mark.parametrize(("device", "name", "dtype"), all_cases())
def test_outputs_and_gradients(device: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    found = errors(CASES[name], dtype, device, monkeypatch)
    outputs, gradients = LIMITS[dtype]
    assert max(found[:2]) <= outputs and max(found[2:]) <= gradients, found


FAULTS = {
    "the output of a later state": ("y0 = _over_states(h * c0)", "y0 = _over_states(h * c1)", tuple(CASES)),
    "the state is not carried": ("h = h * (", "h = 0.0 * h * (", ("one token with a state", "a chunk and one", "three parts")),
    "the parts are not joined": ("for i in range(part):", "for i in range(0 * part):", ("three parts",)),
    "documents off by one": ("s0 = tl.load(same + row,", "s0 = tl.load(same + row + 1,", ("documents",)),
    "rows are too close": ("u0, u1, u2, u3 = _rows(u + row * su, su", "u0, u1, u2, u3 = _rows(u + row * D, D", ("documents",)),
    "the gradient does not decay": ("return g * decay, da", "return g, da", ("a chunk and one", "documents")),
    "the gradient of A without a step size": ("da + exponent * dt", "da + exponent", ("a chunk and one",)),
    "a chunk without its first state": (
        "h = tl.load(borders + (batch * tl.cdiv(T, CHUNK) + chunk)",
        "h = 0.0 * tl.load(borders + (batch * tl.cdiv(T, CHUNK) + chunk)",
        ("a chunk and one",),
    ),
}


@pytest.mark.skipif(not NO_GPU, reason="the interpreter sees them sooner")
@pytest.mark.parametrize(
    ("fault", "name"),
    [
        pytest.param(fault, name, marks=() if name == "one token with a state" else pytest.mark.slow)
        for fault, (_, _, names) in FAULTS.items()
        for name in names
    ],
)
def test_a_planted_fault_is_seen(fault: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case fails with a kernel that is wrong by one word; faults of the forward are sought without a backward."""
    right, wrong, _ = FAULTS[fault]
    plant(fused, "kernels", right, wrong, tmp_path, monkeypatch)
    case = CASES[name]
    if any(word in fault for word in ("gradient", "chunk")):
        found = errors(case, torch.float32, "cpu", monkeypatch)
    else:
        monkeypatch.setattr(fused, "parts_for", lambda programs, chunks: min(case.parts, chunks))
        u, dt, b, c, a, *rest = (x.detach() for x in case.leaves(torch.float32, "cpu"))
        uc = torch.cat([u, c], 2)
        state = rest[0] if rest else None
        got = fused.selective_scan_fused(uc[..., : case.d], dt, a, b, uc[..., case.d :], state, case.ids("cpu"))
        wide = [x.double() for x in (u, dt, a, b, c)]
        want = recurrence(*wide, None if state is None else state.double(), case.ids("cpu"))
        found = [relative(x, y) for x, y in zip(got, want, strict=True)]
    assert not max(found) <= LIMITS[torch.float32][0]


@device_matrix
def test_gradients_that_nobody_asks_for(device: str) -> None:
    """The last state alone, then y alone; without gradients no states are stored."""
    leaves = CASES["one token with a state"].leaves(torch.float32, device)
    u, dt, b, c, a, state = leaves
    y, last = fused.selective_scan_fused(u, dt, a, b, c, state, None)
    du, dc = torch.autograd.grad(last.sum(), (u, c), retain_graph=True)
    assert torch.allclose(du, (dt * b.sum(-1, keepdim=True)), atol=1e-5) and not dc.any()
    assert torch.allclose(torch.autograd.grad(y.sum(), c)[0], last.sum(1, keepdim=True), atol=1e-5)
    assert fused.scan_forward(*(x.detach() for x in (u, dt, a, b, c, state)), None, False)[2].numel() == 0


@device_matrix
def test_nothing_to_scan_and_wider_numbers(device: str) -> None:
    state = torch.randn(2, 8, 16, device=device)
    u, b, a = torch.randn(2, 0, 8, device=device), torch.randn(2, 0, 16, device=device), -torch.rand(8, 16, device=device)
    u.requires_grad_()
    y, last = fused.selective_scan_fused(u, u, a, b, b, state, None)
    assert y.shape == (2, 0, 8) and torch.equal(last, state)
    assert torch.autograd.grad(y.sum() + last.sum(), u)[0].shape == u.shape
    wide = [torch.rand(1, 3, n, dtype=torch.float64, device=device) for n in (8, 8, 16, 16)]
    assert fused.selective_scan_fused(wide[0], wide[1], a.double(), *wide[2:], None, None)[0].dtype == torch.float64
    pool = torch.zeros(1, 8, 16, dtype=torch.float64, device=device)
    y = fused.selective_step_in_place(wide[0][:, 0], wide[1][:, 0], a.double(), wide[2][:, 0], wide[3][:, 0], pool)
    assert y.dtype == torch.float64 and pool.all()


@device_matrix
def test_more_states_than_a_warp_holds(device: str) -> None:
    """Such a model trains on the plain path instead of stopping at its first batch."""
    with pytest.raises(ValueError, match="up to 64 states"):
        fused.layout(65, 8)
    u, b, a = torch.rand(1, 5, 3, device=device), torch.randn(1, 5, 65, device=device), -torch.rand(3, 65, device=device)
    b.requires_grad_()
    y, last = selective_scan(u, u, a, b, b, backend="triton")
    want, end = selective_scan(u, u, a, b, b, backend="torch")
    assert torch.equal(y, want) and torch.equal(last, end) and torch.autograd.grad(y.sum(), b)[0].any()


@device_matrix
def test_document_numbers_in_any_layout(device: str) -> None:
    """Columns of a tensor [t, b], and one row for all."""
    gen = torch.Generator().manual_seed(0)
    u, a, b = torch.rand(3, 9, 4, generator=gen), -torch.rand(4, 5, generator=gen), torch.randn(3, 9, 5, generator=gen)
    u, a, b = (x.to(device) for x in (u, a, b))
    across = boundaries(9, 3, device, 0.4).cumsum(0).t()
    for ids in (across, across[:1].expand(3, -1)):
        got = selective_scan(u, u, a, b, b, segment_ids=ids, backend="triton")
        want = selective_scan(u, u, a, b, b, segment_ids=ids.contiguous(), backend="torch")
        assert not ids.is_contiguous() and max(relative(x, y) for x, y in zip(got, want, strict=True)) < 1e-6


def test_how_a_sequence_is_split() -> None:
    """Full grids stay whole; a lonely sequence of 16k tokens fills the GPU; short ones are not cut into crumbs."""
    assert fused.parts_for(1024, 256) == 1 and fused.parts_for(128, 256) == 8 and fused.parts_for(1, 256) == 32
    assert fused.parts_for(1, 3) == 1
    assert fused.layout(16, 2048) == {"RN": 4, "RC": 2, "LN": 4, "LC": 8} and fused.layout(64, 2048)["RC"] == 1


@device_matrix
@pytest.mark.parametrize("n", [16, 5])
def test_a_step_in_place_with_slots(device: str, n: int) -> None:
    """Pages of a server: rows lie apart, others stay as they are."""
    g = torch.Generator().manual_seed(0)
    u, dt, b, c, a = (torch.randn(*s, generator=g).to(device) for s in ((2, 70), (2, 70), (2, n), (2, n), (70, n)))
    pool = torch.randn(6, 70 * n + 4, generator=g).to(device)[:, : 70 * n].unflatten(1, (70, n))
    before, slots = pool.clone(), torch.tensor([4, 1], device=device)
    y = fused.selective_step_in_place(u, dt.abs(), -a.abs(), b, c, pool, slots)
    want, state = selective_step(u, dt.abs(), -a.abs(), b, c, before[slots])
    assert (y - want).abs().max() < 1e-5 and (pool[slots] - state).abs().max() < 1e-5
    others = [0, 2, 3, 5]
    assert not pool.is_contiguous() and torch.equal(pool[others], before[others])
    with pytest.raises(ValueError, match="dense"):
        fused.selective_step_in_place(u, dt, a, b, c, pool.bfloat16(), slots)


@device_matrix
@pytest.mark.parametrize(("shape", "dtype"), [((2, 9, 300), torch.float32), ((3, 40), torch.float16)])
def test_the_gated_output(device: str, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradients; more rows than one walk of a part takes."""
    monkeypatch.setattr(triton_gate, "_PARTS", 2)
    g = torch.Generator().manual_seed(0)
    y, u, z, up = (torch.randn(*shape, generator=g, dtype=torch.float64).to(device) for _ in range(4))
    leaves = [y.float(), u.to(dtype), torch.randn(shape[-1], generator=g).to(device), z.to(dtype)]
    leaves = [x.requires_grad_() for x in leaves]
    out = scan_gate_fused(*leaves)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = (wide[0] + wide[2] * wide[1]) * wide[3] / (1 + torch.exp(-wide[3]))
    found = zip(
        [out, *torch.autograd.grad((out * up.to(dtype)).sum(), leaves)],
        [exact, *torch.autograd.grad((exact * up.to(dtype)).sum(), wide)],
        strict=True,
    )
    limit = 1e-6 if dtype == torch.float32 else 1e-3
    assert out.dtype == dtype and max(relative(a, b) for a, b in found) < limit
