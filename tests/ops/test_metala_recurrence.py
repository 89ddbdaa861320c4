"""The fused MetaLA operator against an independent recurrence in fp64: 18 cases in three formats, and that each case can fail.

The interpreter, which takes seconds, runs all cases in fp32 and bf16, and in fp16, the same kernels again, the quick ones.

Relative norms of the outputs (y, last state) and of all gradients. fp32: 2e-5 (a nearly constant row has gradients of order 30
through its norm). bf16: outputs 6e-3 and gradients 4e-2, the worst being a norm over such rows. fp16 has three more bits:
outputs 1.5e-3, gradients 1e-2. The interpreter computes as the GPU does, but for the order of sums.
"""

from __future__ import annotations

import itertools
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the fused kernels need Triton: pip install triton")

from megatron.ops.metala import MetaLAInputs, triton_launch
from megatron.ops.metala.reference import metala_reference
from megatron.ops.metala.triton import metala_fused
from tests.ops.fused_cases import DEVICES, NO_GPU, boundaries, device_matrix, plant, relative
from tests.ops.metala_recurrence import recurrence
from tests.ops.triton_bf16 import emulate_bf16

LIMITS = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (6e-3, 4e-2), torch.float16: (1.5e-3, 1e-2)}
# fp16 models multiply in tf32, which the tensor cores cut to ten bits and the interpreter does not: 4.6e-3 in a row that is
# nearly constant in front of its norm ("one token per row", on an H200).
ON_A_GPU = (6e-3, 1e-2)


@dataclass(frozen=True)
class Case:
    """Batch, length, heads, widths; mean of the gate logits; what else the pass has. `parts`: how often the walk is split."""

    b: int
    t: int
    h: int
    k: int
    v: int
    gate: float
    state: bool = True
    documents: float = 0.0
    left_padding: int = 0
    parts: int = 1

    def leaves(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        """q, z, v, g, w and a state, which only a case with a state uses."""
        g = torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))
        b, t, h, k, v = self.b, self.t, self.h, self.k, self.v
        shapes: tuple[tuple[int, ...], ...] = ((b, t, h, k), (b, t, h, k), (b, t, h, v), (b, t, h, v), (h, k), (b, h, k, v))
        leaves = [torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes]
        leaves[1] = (leaves[1] * 1.5 + self.gate).clamp_min(-39)
        leaves[4] = leaves[4] * 0.3
        if self.left_padding:
            leaves[2][0, : self.left_padding] = 0
        return [x.to(device, dtype if i < 5 else torch.float32).requires_grad_() for i, x in enumerate(leaves)]

    def extras(self, device: str) -> tuple[Tensor | None, Tensor | None]:
        """Document numbers and mask [b, t]."""
        ids = boundaries(self.b, self.t, device, self.documents) if self.documents else None
        mask = torch.ones(self.b, self.t, device=device) if self.left_padding else None
        if mask is not None:
            mask[0, : self.left_padding] = 0
        return ids, mask


CASES = {
    "one token with a state": Case(1, 1, 1, 16, 32, 2.0),
    "one token per row": Case(3, 1, 2, 64, 128, 2.0, state=False),
    "a chunk less one": Case(1, 63, 1, 64, 128, 4.0),
    "a chunk and one": Case(1, 65, 1, 64, 128, 4.0),
    "no initial state": Case(3, 63, 1, 32, 64, 2.0, state=False),
    "documents": Case(2, 65, 1, 32, 64, 2.0, documents=0.06),
    "keys as wide as values": Case(1, 66, 1, 64, 64, 2.0),
    "values of 200": Case(1, 45, 1, 64, 200, 2.0),
    "20 by 36": Case(2, 47, 2, 20, 36, 0.0),
    "128 by 256": Case(1, 37, 1, 128, 256, 4.0),
    "96 by 160": Case(1, 40, 1, 96, 160, 2.0),
    "fast decay": Case(1, 70, 1, 64, 128, -6.0),
    "slow decay": Case(1, 70, 1, 64, 128, 8.0),
    "the fastest decay": Case(1, 70, 1, 32, 64, -20.0),
    "a document per token": Case(1, 40, 1, 32, 64, 2.0, documents=1.0),
    "parts and documents": Case(1, 140, 1, 64, 128, 4.0, documents=0.04, parts=3),
    "parts of a narrow head": Case(1, 300, 1, 16, 32, 3.0, parts=3),
    "padding on the left": Case(2, 50, 1, 32, 64, 2.0, left_padding=9),
}
FAST = ("one token with a state", "20 by 36", "documents", "padding on the left", "no initial state")


def run(case: Case, leaves: list[Tensor], exact: bool) -> list[Tensor]:
    """y, last state, and gradients of the leaves used, from fixed upstream gradients; padded outputs are nobody's."""
    ids, mask = case.extras("cpu" if exact else str(leaves[0].device))
    state = leaves[5] if case.state else None
    if exact:
        y, last = recurrence(*leaves[:5], state, ids, mask)
    else:
        y, last = metala_fused(MetaLAInputs(*leaves[:5], state, mask, ids))
    if mask is not None:
        y = y * mask[..., None, None].to(y.dtype)
    gen = torch.Generator().manual_seed(3)
    ups = [torch.randn(x.shape, generator=gen, dtype=torch.float64).to(x.device) for x in (y, last)]
    total = sum((x.double() * up).sum() for x, up in zip((y, last), ups, strict=True))
    return [y, last, *torch.autograd.grad(total, leaves[: 6 if case.state else 5])]


def errors(case: Case, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Relative norms, in the order of `run`."""
    if dtype == torch.bfloat16 and device == "cpu":
        emulate_bf16()
    if case.parts > 1:
        monkeypatch.setattr(triton_launch, "parts_for", lambda programs, chunks: min(case.parts, chunks))
    leaves = case.leaves(dtype, device)
    want = run(case, [x.detach().cpu().double().requires_grad_() for x in leaves], exact=True)
    return [relative(a, b) for a, b in zip(run(case, leaves, exact=False), want, strict=True)]


def all_cases() -> list[Any]:
    """(device, case, format): all on a GPU; those that take the interpreter seconds are slow, and left out in fp16."""
    found = []
    for device in DEVICES:
        place = str(device.values[0])
        for name, dtype in itertools.product(CASES, LIMITS):
            if place == "cuda" or name in FAST or dtype != torch.float16:
                marks = [*device.marks, *([] if name in FAST else [pytest.mark.slow])]
                found.append(pytest.param(place, name, dtype, id=f"{name} {str(dtype)[6:]}-{place}", marks=marks))
    return found


@pytest.mark.parametrize(("device", "name", "dtype"), all_cases())
def test_outputs_and_gradients(device: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    found = errors(CASES[name], dtype, device, monkeypatch)
    outputs, gradients = LIMITS[dtype] if (device, dtype) != ("cuda", torch.float16) else ON_A_GPU
    assert max(found[:2]) <= outputs and max(found[2:]) <= gradients, found


@device_matrix
def test_half_precision_stays_finite_where_half_a_chunk_decays_beyond_its_range(device: str) -> None:
    case = Case(1, 130, 1, 16, 32, -8.0)
    assert all(x.isfinite().all() for x in run(case, case.leaves(torch.float16, device), exact=False))


def test_the_plain_form_is_the_recurrence() -> None:
    """Two texts of one formula, in fp64."""
    for name in ("documents", "padding on the left"):
        case = CASES[name]
        leaves = [x.detach().double() for x in case.leaves(torch.float32, "cpu")]
        ids, mask = case.extras("cpu")
        plain = metala_reference(MetaLAInputs(*leaves, mask, ids))
        assert max(relative(a, b) for a, b in zip(plain, recurrence(*leaves, ids, mask), strict=True)) < 1e-12


def forward_error(case: Case, monkeypatch: pytest.MonkeyPatch) -> float:
    """The larger of the errors of y and the last state, in fp32."""
    if case.parts > 1:
        monkeypatch.setattr(triton_launch, "parts_for", lambda programs, chunks: min(case.parts, chunks))
    leaves = [x.detach() for x in case.leaves(torch.float32, "cpu")]
    ids, mask = case.extras("cpu")
    state = leaves[5] if case.state else None
    got = metala_fused(MetaLAInputs(*leaves[:5], state, mask, ids))
    exact = recurrence(*(x.double() for x in leaves[:5]), None if state is None else state.double(), ids, mask)
    keep = 1.0 if mask is None else mask[..., None, None]
    return max(relative(got[0] * keep, exact[0] * keep), relative(got[1], exact[1]))


SCORES = ("kernels", "oc[:, None] >= oc[None, :]", "oc[:, None] > oc[None, :]")
FAULTS = {
    "a token does not see itself": (SCORES, tuple(CASES)),
    "the state is not carried": (
        ("walks", "s = s * factor[:, None] +", "s = 0.0 * s +"),
        ("one token with a state", "documents"),
    ),
    "the key is rounded": (
        ("kernels", "tl.where(log2 > -0.04328, slow,", "tl.where(log2 > -0.04328, slow.to(tl.float16).to(tl.float32),"),
        ("20 by 36",),
    ),
    "a run of tokens counts twice": (("kernels", "tl.cumsum(total, 0) - total -", "tl.cumsum(total, 0) -"), ("20 by 36",)),
    "rows are too close": (("kernels", "at = row[:, None] * (H * K)", "at = row[:, None] * K"), ("20 by 36",)),
    "padding is written": (
        ("kernels", "    if HAS_MASK:\n        live = live &", "    if HAS_MASK:\n        live = live |"),
        ("padding on the left",),
    ),
}


@pytest.mark.skipif(not NO_GPU, reason="the interpreter sees them sooner")
@pytest.mark.parametrize(
    ("fault", "name"),
    [
        pytest.param(fault, name, marks=() if name in FAST else pytest.mark.slow)
        for fault, (_, names) in FAULTS.items()
        for name in names
    ],
)
def test_a_planted_fault_is_seen(fault: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case fails with a kernel that is wrong by one word."""
    plant(triton_launch, *FAULTS[fault][0], tmp_path, monkeypatch)
    assert not forward_error(CASES[name], monkeypatch) <= LIMITS[torch.float32][0]
