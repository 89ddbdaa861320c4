"""Attention's paths against the formula written out, ALiBi's slopes against the golden list, precision, padding."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron.ops.attention import Places, Rule, alibi_columns, alibi_slopes, attention, visible

B, H, K = 2, 4, 16


def qkv(s: int, n: int | None = None, groups: int = H, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((B, s, H, K), (B, n or s, groups, K), (B, n or s, groups, K))
    q, k, v = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)
    return q, k, v


def slopes(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(alibi_slopes(H), dtype=dtype)


def textbook(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """Loops over queries and heads: what the head of the operator's file says, and nothing shared with it."""
    out = torch.zeros_like(q)
    offset, group = k.shape[1] - q.shape[1], q.shape[2] // k.shape[2]
    for i in range(q.shape[1]):
        first = 0 if rule.window is None else max(0, i + offset - rule.window)
        for h in range(q.shape[2]):
            keys, values = k[:, first : i + offset + 1, h // group], v[:, first : i + offset + 1, h // group]
            score = (keys @ q[:, i, h, :, None]).squeeze(-1) * rule.scale
            if rule.slopes is not None:
                score = score - rule.slopes[h] * torch.arange(i + offset - first, -1, -1)
            out[:, i, h] = (score.softmax(-1)[:, None] @ values).squeeze(1)
    return out


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 0, 3, 20, 64, 200])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("s", [1, 15, 270])
def test_paths_equal_the_textbook(backend: str, groups: int, window: int | None, biased: bool, s: int) -> None:
    q, k, v = qkv(s, groups=groups)
    rule = Rule(K**-0.5, window, slopes() if biased else None)
    want = textbook(q, k, v, rule)
    got = attention(q, k, v, rule, backend=backend)
    assert (got - want).abs().max() < 1e-12  # fp64


@pytest.mark.parametrize("window", [None, 20, 70])
@pytest.mark.parametrize("biased", [False, True])
def test_gradients_of_the_paths_agree(window: int | None, biased: bool) -> None:
    rule = Rule(K**-0.5, window, slopes() if biased else None)
    results = []
    for backend in ("reference", "torch"):
        q, k, v = qkv(300, groups=2)
        y = attention(q, k, v, rule, backend=backend)
        results.append(torch.autograd.grad(y.sin().sum(), (q, k, v)))
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < 1e-11


def random_places(s: int, n: int) -> Places:
    """Rows with 5 padded keys in front, queries at the end, and a document boundary in row 1."""
    key = (torch.arange(n) - 5).clamp_min(-1).expand(B, n).clone()
    segment = torch.zeros(B, n, dtype=torch.long)
    segment[1, n - 10 :] = 1
    return Places(key[:, n - s :].clamp_min(0), key, segment[:, n - s :], segment)


@pytest.mark.parametrize("window", [None, 3, 20, 40])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("s", "n"), [(230, 230), (30, 230), (4, 90), (200, 230)])
def test_places_in_both_paths(window: int | None, biased: bool, s: int, n: int) -> None:
    q, k, v = qkv(s, n)
    rule = Rule(K**-0.5, window, slopes() if biased else None)
    places = random_places(s, n)
    want = attention(q, k, v, rule, places, backend="reference")
    real = (places.key[:, n - s :] >= 0)[..., None, None]
    for contiguous in (False, True):
        got = attention(q, k, v, rule, places, contiguous=contiguous, backend="torch")
        assert ((got - want) * real).abs().max() < 1e-12
        assert got.isfinite().all()


def test_a_row_of_padding_is_finite_with_finite_gradients() -> None:
    q, k, v = qkv(20)
    places = Places(torch.zeros(B, 20, dtype=torch.long), torch.full((B, 20), -1))
    for backend in ("reference", "torch"):
        y = attention(q, k, v, Rule(1.0, None, slopes()), places, backend=backend)
        assert all(t.isfinite().all() for t in (y, *torch.autograd.grad(y.sum(), (q, k, v))))
    assert visible(places, None).all()


def test_key_index_form_equals_the_relative_form() -> None:
    """+m j instead of -m (i - j): the difference is one number per query (spec B1)."""
    q, k, v = (t.detach() for t in qkv(60))
    m = slopes()
    relative = attention(q, k, v, Rule(0.25, None, m), backend="reference")
    scores = torch.einsum("bshk,bnhk->bhsn", q, k) * 0.25 + m[:, None, None] * torch.arange(60)
    hidden = torch.ones(60, 60, dtype=torch.bool).triu(1)
    other = torch.einsum("bhsn,bnhk->bshk", scores.masked_fill(hidden, -math.inf).softmax(-1), v)
    assert (relative - other).abs().max() < 1e-13


def test_slopes_equal_the_golden_list_and_its_parts(golden_neox: Path) -> None:
    golden = json.loads((golden_neox / "alibi.json").read_text())
    for n in range(1, 65):
        assert alibi_slopes(n) == pytest.approx(golden["slopes_float64_by_num_heads"][str(n)], rel=1e-15)
    parts = [
        case for case in golden["tp_slices"] if case["mp_rank"] < case["mp_size"] and case["num_heads"] % case["mp_size"] == 0
    ]
    assert len(parts) > 100
    for case in parts:
        share = case["num_heads"] // case["mp_size"]
        part = torch.tensor(alibi_slopes(case["num_heads"]))[case["mp_rank"] * share :][:share]
        assert part.tolist() == pytest.approx(case["slopes_f32"], rel=1e-7)


def test_slopes_of_other_steepness() -> None:
    assert alibi_slopes(4, 4.0) == [0.5, 0.25, 0.125, 0.0625]
    assert len(alibi_slopes(129)) == 129 and alibi_slopes(12)[8] == 2**-0.5


@pytest.mark.parametrize("heads", [8, 12, 16])
def test_the_bias_in_columns_is_exact_at_16384_tokens_in_bf16(heads: int) -> None:
    """The bias that bf16 columns carry, up to a constant per query, where the softmax can see it.

    A key's weight is at most exp(-m d) of the nearest one's; the error counts by that weight. The same bias as one bf16
    number per key index (what a half-precision table holds) is wrong by whole units.
    """
    n, scale = 16384, 64**-0.5
    m = torch.tensor(alibi_slopes(heads))
    q = torch.zeros(1, heads, 1, 64, dtype=torch.bfloat16)
    k = torch.zeros(1, 1, n, 64, dtype=torch.bfloat16)
    wide_q, wide_k = alibi_columns(q, k, m, torch.arange(n)[None], scale)
    carried = (wide_q.double() @ wide_k.double().transpose(-1, -2)).squeeze() * scale
    distance = torch.arange(n - 1, -1, -1).double()
    exact = -m.double()[:, None] * distance
    error = (carried - carried[:, -1:] - exact).abs()
    assert (error * exact.exp()).max() < 1e-3
    table = (m.bfloat16()[:, None] * torch.arange(n).bfloat16()).double()
    assert ((table - table[:, -1:] - exact).abs() * exact.exp()).max() > 0.1


@pytest.mark.parametrize("n", [512, 4096, 70000])
def test_alibi_in_fp32_columns_against_fp64(n: int) -> None:
    """The last 32 queries of a long row; sums of m j near 1e4 leave about 1e-3 of fp32 resolution in a score."""
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, s, 2, 8, generator=g) for s in (32, n, n))
    key = torch.arange(n)[None]
    places = Places(key[:, -32:], key)
    m = torch.tensor(alibi_slopes(2))
    want = attention(q.double(), k.double(), v.double(), Rule(0.35, None, m.double()), places, backend="reference")
    got = attention(q, k, v, Rule(0.35, None, m), places, backend="torch")
    assert (got - want).abs().max() < 2e-7 * n * float(m.max()) + 1e-6


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_half_precision(backend: str) -> None:
    """bf16 inputs: within a few rounding steps (2^-8) of fp64 on the same rounded inputs."""
    q, k, v = (t.detach() for t in qkv(300, dtype=torch.bfloat16))
    want = attention(q.double(), k.double(), v.double(), Rule(0.25, 100, slopes()), backend="reference")
    got = attention(q, k, v, Rule(0.25, 100, slopes(torch.float32)), backend=backend)
    assert got.dtype == torch.bfloat16 and (got.double() - want).abs().max() < 0.03


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_dropout_keeps_the_mean(backend: str) -> None:
    q, k, v = (t.detach() for t in qkv(40))
    torch.manual_seed(0)
    whole = attention(q, k, torch.ones_like(v), Rule(0.25), backend=backend)
    dropped = torch.stack([attention(q, k, torch.ones_like(v), Rule(0.25, dropout=0.3), backend=backend) for _ in range(60)])
    assert (whole - 1).abs().max() < 1e-12 and dropped.std() > 0.05
    assert abs(float(dropped.mean()) - 1) < 0.01  # 60 x 5120 draws: standard error about 0.001
