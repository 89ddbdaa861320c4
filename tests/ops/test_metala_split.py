"""Splitting a sequence where batch x heads is small: the same numbers as one walk, at every edge, and when it is chosen.

fp32 against fp64: 3e-5 of the norm. The walk itself stays within 1e-5 at real widths; norms over 32 channels, which keep this
cheap, now and then divide by a small spread (1.2e-5 was seen without any split).
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the fused kernels need Triton: pip install triton")

from megatron.ops.metala import metala, triton_launch
from tests.ops.fused_cases import boundaries, device_matrix, mostly_slow, relative, results


def leaves_for(t: int, k: int, gate_mean: float, device: str) -> list[Tensor]:
    """q, z, v, g, w and an initial state of one row: with two heads, or with one where it is long."""
    g = torch.Generator().manual_seed(t)
    h, v = 2 if t < 300 else 1, 2 * k
    shapes: Sequence[tuple[int, ...]] = ((1, t, h, k), (1, t, h, k), (1, t, h, v), (1, t, h, v), (h, k), (1, h, k, v))
    leaves = [torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes]
    leaves[1] = leaves[1] + gate_mean
    return [x.to(device, torch.float32).requires_grad_() for x in leaves]


def worst(leaves: list[Tensor], documents: bool) -> float:
    t, device = leaves[0].shape[1], str(leaves[0].device)
    ids = boundaries(1, t, device, 0.02) if documents else None

    def run(backend: str, q: Tensor, z: Tensor, v: Tensor, g: Tensor, w: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        return metala(q, z, v, g, w, state=state, segment_ids=ids, backend=backend)

    exact = results(lambda *x: run("reference", *x), [x.detach().double().requires_grad_() for x in leaves])
    got = results(lambda *x: run("triton", *x), leaves)
    return max(relative(a, b) for a, b in zip(got, exact, strict=True))


@device_matrix
@mostly_slow("t", [1, 65], [63, 128, 200])
@pytest.mark.parametrize("documents", [False, True])
def test_any_length_with_states_and_documents(device: str, t: int, documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part per chunk, the hardest cut: every boundary of a chunk is one of a part, the last part may be one token long."""
    monkeypatch.setattr(triton_launch, "parts_for", lambda programs, chunks: chunks)
    assert worst(leaves_for(t, 16, 2.0, device), documents) < 3e-5


@device_matrix
@pytest.mark.slow
@pytest.mark.parametrize(("parts", "gate_mean"), [(2, 4.0), (3, -4.0), (4, -20.0)])
def test_parts_of_several_chunks(device: str, parts: int, gate_mean: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks to a part and a shorter last one; slow and fast decays (a part may leave nothing of its start)."""
    monkeypatch.setattr(triton_launch, "parts_for", lambda programs, chunks: min(parts, chunks))
    assert worst(leaves_for(330, 16, gate_mean, device), True) < 3e-5


@pytest.mark.slow
@device_matrix
def test_it_happens_by_itself_in_a_long_lonely_sequence(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of one head and nine chunks is cut in two by the rule itself, and the join runs."""
    joined = []
    real = triton_launch._join
    monkeypatch.setattr(triton_launch, "_join", lambda *a: joined.append(a[0].shape[1]) or real(*a))
    assert worst(leaves_for(32 * 8 + 3, 16, 2.0, device), False) < 3e-5
    assert joined == [2, 2, 2]  # forward; backward: states again, then their gradients


def test_when_a_sequence_is_split() -> None:
    rule = triton_launch.parts_for
    assert rule(128, 1000) == 1  # enough programs
    assert rule(16, 3) == 1 and rule(16, 7) == 1  # too short to be worth it
    assert rule(16, 32) == 8 and rule(16, 128) == 12  # 4 chunks to a part; about 200 programs
    assert rule(2, 10_000) == 16  # no more parts than the join can walk through in no time
