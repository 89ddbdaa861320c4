"""The MetaLA operator: chunked path against the token-by-token one, with gradients; rounding switch; block boundaries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import megatron.ops.metala.chunk as op
from megatron.ops.metala import decay_and_key, metala, metala_step
from megatron.ops.scan import scan_recurrent


def draw(b: int, s: int, h: int = 2, k: int = 4, v: int = 8, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(b, s, h, k), (b, s, h, k), (b, s, h, v), (b, s, h, v), (h, k), (b, h, k, v)]
    return [torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def run(leaves: list[Tensor], backend: str, with_state: bool, **extra: Tensor | str | None) -> list[Tensor]:
    q, z, v, g, w, state = leaves
    y, final = metala(q, z, v, g, w, state=state if with_state else None, backend=backend, **extra)  # type: ignore[arg-type]
    gen = torch.Generator().manual_seed(9)
    total = sum((t * torch.randn(t.shape, generator=gen, dtype=torch.float64)).sum() for t in (y, final))
    return [y, final, *torch.autograd.grad(total, leaves if with_state else leaves[:-1])]


@pytest.mark.parametrize("s", [1, 15, 63, 64, 65, 200])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_chunked_equals_reference(s: int, documents: bool, with_state: bool) -> None:
    leaves = draw(3, s)
    ids = (torch.rand(3, s, generator=torch.Generator().manual_seed(4)) < 0.06).cumsum(1) if documents else None
    for a, b in zip(
        run(leaves, "reference", with_state, segment_ids=ids), run(leaves, "torch", with_state, segment_ids=ids), strict=True
    ):
        assert (a - b).abs().max() <= 1e-10  # fp64, sums of a few hundred terms of size O(10)


@pytest.mark.parametrize(("b", "s"), [(5, 40), (2, 300)])
def test_cache_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch, b: int, s: int) -> None:
    """Blocks of rows (short sequences) and of tokens (long ones) give what one block gives, documents and states included."""
    leaves = draw(b, s)
    ids = (torch.rand(b, s, generator=torch.Generator().manual_seed(4)) < 0.03).cumsum(1)
    whole = run(leaves, "torch", True, segment_ids=ids)
    monkeypatch.setattr(op, "_CPU_TOKENS", 128)
    for a, c in zip(whole, run(leaves, "torch", True, segment_ids=ids), strict=True):
        assert (a - c).abs().max() <= 1e-10


def test_padding_leaves_the_state_alone() -> None:
    leaves = [t.detach() for t in draw(2, 30)]
    q, z, v, g, w, state = leaves
    mask = torch.ones(2, 30)
    mask[0, 20:] = 0  # right padding
    mask[1, :7] = 0  # left padding
    for backend in ("reference", "torch"):
        y, final = metala(q, z, v * mask[..., None, None], g, w, state=state, mask=mask, backend=backend)
        alone, end = metala(q[:1, :20], z[:1, :20], v[:1, :20], g[:1, :20], w, state=state[:1], backend=backend)
        assert (y[:1, :20] - alone).abs().max() <= 1e-12 and (final[:1] - end).abs().max() <= 1e-12
        alone, end = metala(q[1:, 7:], z[1:, 7:], v[1:, 7:], g[1:, 7:], w, state=state[1:], backend=backend)
        assert (y[1:, 7:] - alone).abs().max() <= 1e-12 and (final[1:] - end).abs().max() <= 1e-12


def test_step_equals_pass() -> None:
    q, z, v, g, w, state = (t.detach() for t in draw(2, 12))
    whole, final = metala(q, z, v, g, w, state=state)
    for t in range(12):
        y, state = metala_step(q[:, t], z[:, t], v[:, t], g[:, t], w, state)
        assert (y - whole[:, t]).abs().max() <= 1e-12
    assert (state - final).abs().max() <= 1e-12


def test_key_does_not_cancel_and_rounding_switch_does() -> None:
    """At gate logits near 4, 1 - exp(l) in bf16 is zero for most channels; the fp32 key is right to 1e-6."""
    z = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 1.5 + 4
    exact = -torch.expm1(torch.nn.functional.logsigmoid(z.double()) / 16)
    _, key = decay_and_key(z)
    assert ((key - exact).norm() / exact.norm()) < 1e-6
    _, rounded = decay_and_key(z, "bf16")
    assert (rounded == 0).float().mean() > 0.5


def test_unscaled_augmentation_and_scale() -> None:
    """w = 0 makes step 8 a no-op under the mean-subtracting norm; a missing dk^-0.5 would show."""
    q, z, v, g, w, _ = (t.detach() for t in draw(2, 20, k=16))
    y, _ = metala(q, z, v, g, torch.zeros_like(w))
    log_decay, key = decay_and_key(z)
    o, _ = scan_recurrent(q, key, v, log_decay, scale=16**-0.5)
    plain = torch.nn.functional.layer_norm(o, o.shape[-1:], eps=1e-5) * torch.nn.functional.silu(g)
    assert (y - plain).abs().max() <= 1e-10
    wrong, _ = scan_recurrent(q, key, v, log_decay, scale=1.0)
    off = torch.nn.functional.layer_norm(wrong, o.shape[-1:], eps=1e-5) * torch.nn.functional.silu(g)
    assert (y - off).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_keep_fp32_inside(dtype: torch.dtype) -> None:
    """Only inputs and output are rounded: relative error of the output stays near one rounding of the dtype."""
    leaves = draw(2, 100, k=16, v=32, dtype=dtype)
    exact = [t.detach().double() for t in leaves]
    y, final = metala(*leaves[:5], state=leaves[5].float())
    ref, ref_final = metala(*exact[:5], state=exact[5], backend="reference")
    assert final.dtype == torch.float32 and y.dtype == dtype
    assert (y.double() - ref).norm() / ref.norm() < {torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]
    assert (final.double() - ref_final).norm() / ref_final.norm() < 1e-5
