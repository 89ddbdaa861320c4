"""The short convolution: fast path against the plain form and against torch's conv1d, with history, boundaries and padding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron.ops.conv import causal_conv, next_history


@pytest.mark.parametrize("s", [1, 2, 3, 4, 9, 70])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("with_history", [False, True])
def test_fast_path_equals_reference(s: int, width: int, with_history: bool) -> None:
    g = torch.Generator().manual_seed(s)
    x, w = (torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True) for shape in ((2, s, 6), (6, 1, width)))
    h = torch.randn(2, width - 1, 6, generator=g, dtype=torch.float64, requires_grad=True) if with_history else None
    leaves = [x, w] + ([h] if h is not None else [])
    out = []
    for backend in ("reference", "torch"):
        y = causal_conv(x, w, history=h, backend=backend)
        up = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        out.append([y, *torch.autograd.grad((y * up).sum(), leaves)])
    for a, b in zip(*out, strict=True):
        assert (a - b).abs().max() <= 1e-12


def test_equals_conv1d_with_bias() -> None:
    g = torch.Generator().manual_seed(0)
    x, w, bias = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((2, 11, 6), (6, 1, 4), (6,)))
    expected = F.silu(F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), w, bias, groups=6)).transpose(1, 2)
    assert (causal_conv(x, w, bias) - expected).abs().max() <= 1e-12


def test_documents_do_not_see_each_other() -> None:
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((1, 12, 6), (6, 1, 4)))
    ids = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2]])
    y = causal_conv(x, w, segment_ids=ids)
    for a, b in ((0, 5), (5, 7), (7, 12)):
        assert (y[:, a:b] - causal_conv(x[:, a:b], w)).abs().max() <= 1e-12


def test_history_ends_at_the_last_real_token() -> None:
    x = torch.arange(1.0, 13.0).reshape(2, 6, 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    got = next_history(x * mask[..., None], None, 4, mask)
    assert got[0, :, 0].tolist() == [4, 5, 6]
    assert got[1, :, 0].tolist() == [0, 7, 8]
    kept = next_history(torch.zeros(2, 3, 1), got, 4, torch.zeros(2, 3))  # a row without any token keeps its window
    assert kept.tolist() == got.tolist()
