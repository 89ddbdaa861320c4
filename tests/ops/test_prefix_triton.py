"""Fused prefix attention (JRT) against all pairs in fp64, with gradients: any prefix, padding, documents, states."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the fused kernels need Triton: pip install triton")

from megatron.ops.taylor import triton_launch
from megatron.ops.taylor.prefix import prefix_taylor
from megatron.ops.taylor.triton_state import taylor_state
from megatron.ops.tuning import taylor_cut
from tests.ops.fused_cases import NO_GPU, boundaries, device_matrix, mostly_slow
from tests.ops.taylor_recurrence import packed, recurrence
from tests.ops.triton_bf16 import emulate_bf16

LIMITS = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (6e-3, 4e-2)}


def exact(
    q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, inside: Tensor, state: Any, keep: Any, ids: Any
) -> tuple[Tensor, Tensor]:
    """The causal recurrence, plus what every query sees of its document's part of the prefix, pair by pair."""
    sums, last = recurrence(q, k, v, state, keep, None, ids)
    scores = torch.einsum("bihf,bjhf->bhij", q, k2) / q.shape[-1] ** 0.5
    m = k2.shape[1]
    seen = inside[:, None].expand(-1, q.shape[1], -1)
    if ids is not None:
        seen = seen * (ids[:, :, None] == ids[:, None, :m]).double()
    u = torch.cat([v2, torch.ones_like(v2[..., :1])], -1)
    sums = sums + torch.einsum("bhij,bjhv->bihv", (1 + scores + scores**2 / 2) * seen[:, None], u)
    return sums[..., :-1] / (sums[..., -1:] + 1e-12), last + torch.einsum("bjhe,bjhv,bj->bhev", packed(k2), u, seen[:, -1])


CASES = {
    # s, m, f, v, documents, padding, state
    "one token": (1, 1, 16, 16, 0.0, False, False),
    "no prefix": (18, 0, 16, 16, 0.0, False, False),
    "a prefix of all": (18, 18, 8, 20, 0.0, False, False),
    "a short prefix": (20, 7, 16, 33, 0.0, False, False),
    "padding": (20, 12, 7, 16, 0.0, True, False),
    "a state": (20, 9, 16, 16, 0.0, False, True),
    "a prefix longer than a chunk": (40, 35, 16, 64, 0.0, False, False),
    "values of 128": (20, 9, 16, 128, 0.0, False, False),
    "padding and a state": (20, 12, 16, 64, 0.0, True, True),
    "documents": (20, 12, 16, 16, 0.2, False, False),
    "documents and padding": (20, 20, 16, 32, 0.1, True, False),
    "documents and a state": (33, 18, 8, 32, 0.06, False, True),
}
FAST = ("one token", "no prefix", "padding", "a state")


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted kernels cut a sequence every 16 tokens, so that short ones, which cost seconds, have several chunks."""
    if NO_GPU:
        monkeypatch.setattr(triton_launch, "taylor_cut", lambda v, form: replace(taylor_cut(v, form), chunk=16))


def errors(name: str, dtype: torch.dtype, device: str) -> list[float]:
    """Relative norms of y, the last state, and the gradients of q, k, v, k2, v2 and the state."""
    s, m, f, width, documents, padding, with_state = CASES[name]
    g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    b = 2 if padding else 1
    if device == "cuda":  # there a chunk has up to 64 tokens
        s, m = 4 * s, 4 * m
    draws = [torch.randn(b, t, 1, n, generator=g, dtype=torch.float64) for t in (s, m) for n in (f, f, width)]
    leaves = [x.to(device, dtype).requires_grad_() for x in (*draws[:3], *draws[4:])]
    if with_state:
        earlier = [torch.randn(b, 5, 1, n, generator=g, dtype=torch.float64) for n in (f, f, width)]
        leaves.append(recurrence(*earlier)[1].to(device, torch.float32).requires_grad_())
    keep = (torch.rand(b, s, generator=g) < 0.8).double() if padding else None
    inside = torch.ones(b, m, dtype=torch.float64) if keep is None else keep[:, :m]
    ids = boundaries(b, s, "cpu", documents) if documents else None
    wide = [x.detach().cpu().double().requires_grad_() for x in leaves]
    extras = {"keep": keep, "segment_ids": ids}
    options: dict[str, Any] = {name: None if x is None else x.to(device) for name, x in extras.items()}
    options["state"] = leaves[5] if with_state else None
    results = []
    for used, outputs in (
        (leaves, prefix_taylor(*leaves[:5], inside.float().to(device), backend="triton", **options)),
        (wide, exact(*wide[:5], inside, wide[5] if with_state else None, keep, ids)),
    ):
        up = torch.Generator().manual_seed(3)
        total = sum((x.double() * torch.randn(x.shape, generator=up, dtype=torch.float64).to(x.device)).sum() for x in outputs)
        results.append([*outputs, *torch.autograd.grad(total, used)])
    return [
        float((a.detach().cpu().double() - b.detach()).norm() / b.detach().norm().clamp_min(1.0))
        for a, b in zip(*results, strict=True)
    ]


@device_matrix
@mostly_slow("name", FAST, [name for name in CASES if name not in FAST])
def test_outputs_and_gradients(device: str, name: str) -> None:
    found = errors(name, torch.float32, device)
    assert max(found) <= LIMITS[torch.float32][0], found


@device_matrix
@mostly_slow("name", ["a short prefix"], ["a prefix longer than a chunk", "padding and a state", "documents and padding"])
def test_outputs_and_gradients_in_bf16(device: str, name: str) -> None:
    if device == "cpu":
        emulate_bf16()
    found = errors(name, torch.bfloat16, device)
    outputs, gradients = LIMITS[torch.bfloat16]
    assert max(found[:2]) <= outputs and max(found[2:]) <= gradients, found


@device_matrix
def test_the_custom_operator_is_whole(device: str) -> None:
    """Schema, fake tensors and autograd registration, as torch's own checker sees them."""
    k, v = (torch.randn(1, 5, 1, n, device=device, requires_grad=True) for n in (16, 8))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(taylor_state, (k, v, torch.ones(1, 5, device=device)), test_utils=checks)
