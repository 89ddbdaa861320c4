"""Summaries of context-parallel shards: each obeys `final(S) = D S + A` for its operator, and has the reference's gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.ops.metala import metala
from megatron.ops.metala.inputs import cut_packed
from megatron.ops.metala.summary import metala_summary
from megatron.ops.scan import gated_scan
from megatron.ops.selective_scan import selective_scan
from megatron.ops.summary.gated import gated_summary
from megatron.ops.summary.selective import selective_summary
from megatron.ops.summary.suffix import exclusive_sums
from megatron.ops.summary.taylor import taylor_summary
from megatron.ops.taylor import feature_count, taylor

B, H, K, V = 2, 3, 4, 5
Summary = tuple[Tensor, Tensor | None]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gated(s: int) -> dict[str, Tensor]:
    return {"key": draw(B, s, H, K), "v": draw(B, s, H, V, seed=1), "log_decay": F.logsigmoid(draw(B, s, H, K, seed=2)) / 4}


def of_metala(s: int) -> dict[str, Tensor]:
    return {"z": 2 * draw(B, s, H, K), "v": draw(B, s, H, V, seed=1)}


def of_taylor(s: int) -> dict[str, Tensor]:
    return {"k": draw(B, s, H, K), "v": draw(B, s, H, V, seed=1)}


def selective(s: int) -> dict[str, Tensor]:
    dt, rates = F.softplus(draw(B, s, 6, seed=1) - 2), -(draw(6, K, seed=2).exp())
    return {"u": draw(B, s, 6), "dt": dt, "rates": rates, "b": draw(B, s, K, seed=3)}


def rates_of(s: int) -> Tensor:
    return torch.tensor([-0.01, -0.1, -0.5], dtype=torch.float64).expand(1, s, H)


def final_gated(x: dict[str, Tensor], ids: Tensor | None, state: Tensor) -> Tensor:
    return gated_scan(x["key"], x["key"], x["v"], x["log_decay"], state=state, segment_ids=ids)[1]


def final_metala(x: dict[str, Tensor], ids: Tensor | None, state: Tensor) -> Tensor:
    z, v = x["z"], x["v"]
    return metala(z, z, v, v, torch.zeros(H, K, dtype=z.dtype), state=state, segment_ids=ids, backend="reference")[1]


def final_taylor(x: dict[str, Tensor], ids: Tensor | None, state: Tensor) -> Tensor:
    return taylor(x["k"], x["k"], x["v"], state=state, segment_ids=ids)[1]


def final_decayed(x: dict[str, Tensor], ids: Tensor | None, state: Tensor) -> Tensor:
    return taylor(x["k"], x["k"], x["v"], state=state, segment_ids=ids, log_decay=rates_of(x["k"].shape[1]))[1]


def final_selective(x: dict[str, Tensor], ids: Tensor | None, state: Tensor) -> Tensor:
    return selective_scan(x["u"], x["dt"], x["rates"], x["b"], x["b"], state=state, segment_ids=ids)[1]


def with_decay(k: Tensor, v: Tensor, segment_ids: Tensor | None, backend: str) -> Summary:
    return taylor_summary(k, v, segment_ids, rates_of(k.shape[1]), backend=backend)


CASES: dict[str, tuple[Callable[[int], dict[str, Tensor]], Callable[..., Summary], Callable[..., Tensor], tuple[int, ...]]] = {
    "gated": (gated, gated_summary, final_gated, (B, H, K, V)),
    "metala": (of_metala, metala_summary, final_metala, (B, H, K, V)),
    "taylor": (of_taylor, taylor_summary, final_taylor, (B, H, feature_count(K), V + 1)),
    "taylor with decay": (of_taylor, with_decay, final_decayed, (B, H, feature_count(K), V + 1)),
    "selective": (selective, selective_summary, final_selective, (B, 6, K)),
}
LENGTHS = [1, 37, 64, 300]


def three_documents(s: int) -> Tensor:
    at = torch.arange(s).expand(B, s)
    return (at >= s // 3).int() + (at >= torch.tensor([[s // 2], [s - 1]])).int()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", CASES)
def test_the_last_state_is_affine_in_the_first(case: str, length: int) -> None:
    """final(S) = D S + A with one document, final(S) = A if a document begins inside."""
    inputs, summary, final, shape = CASES[case]
    x, state = inputs(length), draw(*shape, seed=7)
    left, decay = summary(**x, segment_ids=None, backend="torch")
    assert (final(x, None, state) - (state * (1 if decay is None else decay) + left)).abs().max() < 1e-11
    if length > 1:
        ids = three_documents(length)
        assert (final(x, ids, state) - summary(**x, segment_ids=ids, backend="torch")[0]).abs().max() < 1e-11


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_reference(case: str, documents: bool, length: int) -> None:
    """Of every input, from both results; blocks and chunks of every length."""
    inputs, summary, _, _ = CASES[case]
    ids, results = three_documents(length) if documents else None, []
    for backend in ("reference", "torch"):
        x = {name: t.clone().requires_grad_() for name, t in inputs(length).items()}
        outputs = [t for t in summary(**x, segment_ids=ids, backend=backend) if t is not None]
        loss = sum((t * draw(*t.shape, seed=9)).sum() for t in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, list(x.values()))])
    for reference, own in zip(*results, strict=True):
        assert (reference - own).abs().max() <= 1e-11 * max(1.0, float(reference.detach().abs().max()))


def test_one_rate_per_head() -> None:
    x = gated(70)
    x["log_decay"] = x["log_decay"][..., :1].requires_grad_()
    left, decay = gated_summary(**x)
    assert decay.shape == (B, H, K, 1)
    (grad,) = torch.autograd.grad(left.sum() + decay.sum(), x["log_decay"])
    assert grad.shape == x["log_decay"].shape


def test_rounded_gates_of_metala() -> None:
    """`gate_round` scores released checkpoints: key and decay are rounded before they are summed."""
    x = {name: t.float() for name, t in of_metala(70).items()}
    reference = metala_summary(**x, gate_round="bf16", backend="reference")
    own = metala_summary(**x, gate_round="bf16", backend="torch")
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(reference, own, strict=True))
    assert (own[0] - metala_summary(**x)[0]).abs().max() > 1e-3


def test_views_of_a_packed_projection_in_half_precision() -> None:
    """bf16 inputs, fp32 results: those of the same numbers in fp64 up to fp32 rounding; gradients in bf16."""
    packed = (2 * draw(B, 300, 2 * H * (K + V))).bfloat16().requires_grad_()
    exact = packed.detach().double().requires_grad_()
    results = []
    for tensor in (exact, packed):
        _, z, v, _ = cut_packed(tensor, torch.zeros(H, K))
        left, decay = metala_summary(z, v)
        (grad,) = torch.autograd.grad((left * draw(*left.shape)).sum() + decay.sum(), tensor)
        results.append((left, decay, grad))
    assert results[1][0].dtype == results[1][1].dtype == torch.float32 and results[1][2].dtype == torch.bfloat16
    for reference, own, limit in zip(*results, (1e-5, 1e-5, 1e-2), strict=True):
        assert (reference - own).abs().max() <= limit * reference.detach().abs().max()


def test_sums_from_the_right_end_keep_the_decay_exact() -> None:
    """131,072 tokens in fp32: exp of the sum behind each token, where a difference of running sums is wrong by 1e-4."""
    x = -torch.rand(1, 131_072, 1, generator=torch.Generator().manual_seed(0))
    exact = x.double().flip(1).cumsum(1).flip(1) - x.double()
    own, total = exclusive_sums(x, behind=True)
    assert (own.double().exp() - exact.exp()).abs().max() < 1e-6
    assert total.item() == pytest.approx(float(x.double().sum()), rel=1e-6)
    running = x.cumsum(1)
    assert ((running[:, -1:] - running).double().exp() - exact.exp()).abs().max() > 1e-4


@pytest.mark.parametrize("s", [1, 63, 64, 65, 200])
def test_exclusive_sums(s: int) -> None:
    x = draw(2, s, 3)
    for behind, whole in ((True, x.flip(1).cumsum(1).flip(1)), (False, x.cumsum(1))):
        own, total = exclusive_sums(x, behind)
        assert (own - (whole - x)).abs().max() < 1e-12 and (total - x.sum(1)).abs().max() < 1e-12


def test_autocast_changes_nothing() -> None:
    x: dict[str, Any] = {name: t.float().requires_grad_() for name, t in of_metala(40).items()}
    plain = metala_summary(**x)
    with torch.autocast("cpu", torch.bfloat16):
        under = metala_summary(**x)
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))
