"""GPU paths of attention: what is chosen, what is asked of each kernel (on stand-ins here), on a GPU the numbers."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.ops.attention import Places, Rule, alibi_slopes, attention_reference
from megatron.ops.attention.triton import attention_fused, by_flash_attn, by_flex, by_varlen, document_bounds, route

B, S, H, G, K = 2, 300, 4, 2, 16
SLOPES = torch.tensor(alibi_slopes(H))
RULES = {
    "alibi": Rule(0.3, None, SLOPES),
    "window": Rule(0.3, 50),
    "alibi window": Rule(0.3, 50, SLOPES),
    "rows of slopes": Rule(0.3, None, torch.stack([SLOPES, SLOPES / 2])),
    "plain": Rule(0.3),
}


def qkv(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    made = [torch.randn(B, S, heads, K, generator=g).to(device, dtype).requires_grad_() for heads in (H, G, G)]
    return made[0], made[1], made[2]


def documents(device: str = "cpu") -> Places:
    """Three documents in row 0, one in row 1."""
    segments = torch.zeros(B, S, dtype=torch.long, device=device)
    segments[0, 37:] += 1
    segments[0, 210:] += 1
    places = torch.arange(S, device=device).expand(B, S)
    return Places(places, places, segments, segments)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_flex_is_asked_for_the_formula(name: str, packed: bool) -> None:
    """FlexAttention's own eager form runs on a CPU, forward only; 300 tokens are filled up to 384."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (t.detach() for t in qkv())
    places = documents() if packed else None
    got = by_flex(q, k, v, RULES[name], places, flex_attention)
    assert (got - attention_reference(q, k, v, RULES[name], places, True)).abs().max() < 1e-5


def test_document_bounds() -> None:
    assert document_bounds(documents().query_segment, B, S, torch.device("cpu")).tolist() == [0, 37, 210, 300, 600]
    assert document_bounds(None, 3, 5, torch.device("cpu")).tolist() == [0, 5, 10, 15]


def test_documents_are_counted_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting waits for the GPU; other ids, or ids changed in place, are counted again."""
    counted: list[Tensor] = []
    plain = Tensor.nonzero
    monkeypatch.setattr(Tensor, "nonzero", lambda self: counted.append(self) or plain(self))
    segments = documents().query_segment
    assert segments is not None
    for _ in range(3):
        assert document_bounds(segments, B, S, segments.device).tolist() == [0, 37, 210, 300, 600]
    assert len(counted) == 1
    segments[1, 100:] += 1
    assert document_bounds(segments, B, S, segments.device).tolist() == [0, 37, 210, 300, 400, 600]
    assert document_bounds(documents().query_segment, B, S, segments.device).tolist() == [0, 37, 210, 300, 600]
    assert len(counted) == 3


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("release", ["2.11", "2.13"])
def test_varlen_is_asked_for_the_formula(
    monkeypatch: pytest.MonkeyPatch, window: int | None, packed: bool, release: str
) -> None:
    """Torch 2.11 has no `enable_gqa` and takes as many heads of keys as of queries."""
    from torch.nn.attention import varlen

    Bounds = tuple[int, int]

    def formula(
        q: Tensor, k: Tensor, v: Tensor, bq: Tensor, bk: Tensor, mq: int, mk: int, scale: float, size: Bounds
    ) -> Tensor:
        assert torch.equal(bq, bk) and mq == mk == S and size[1] == 0
        rule = Rule(scale, None if size[0] < 0 else size[0])
        parts = [
            attention_reference(q[None, a:z], k[None, a:z], v[None, a:z], rule, None, True)[0]
            for a, z in zip(bq.tolist(), bq.tolist()[1:], strict=False)
        ]
        return torch.cat(parts)

    def older(*tensors: Any, scale: float, window_size: Bounds) -> Tensor:
        assert tensors[0].shape == tensors[1].shape
        return formula(*tensors, scale, window_size)

    def newer(*tensors: Any, scale: float, window_size: Bounds, enable_gqa: bool = False) -> Tensor:
        assert enable_gqa == (tensors[0].shape != tensors[1].shape)
        return formula(*tensors, scale, window_size)

    monkeypatch.setattr(varlen, "varlen_attn", older if release == "2.11" else newer)
    q, k, v = (t.detach() for t in qkv())
    places = documents() if packed else None
    got = by_varlen(q, k, v, Rule(0.3, window), places)
    assert (got - attention_reference(q, k, v, Rule(0.3, window), places, True)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["alibi", "alibi window"])
def test_flash_attn_is_asked_for_the_formula(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def stand_in(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        assert options["causal"] and options["alibi_slopes"].dtype == torch.float32 and (options["alibi_slopes"] > 0).all()
        left, right = options["window_size"]
        assert (left, right) == ((-1, -1) if left < 0 else (left, 0))
        rule = Rule(options["softmax_scale"], None if left < 0 else left, options["alibi_slopes"])
        return attention_reference(q, k, v, rule, None, True)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=stand_in))
    q, k, v = (t.detach() for t in qkv())
    assert torch.equal(by_flash_attn(q, k, v, RULES[name]), attention_reference(q, k, v, RULES[name], None, True))


@pytest.mark.parametrize(
    ("facts", "taken"),
    [
        ({}, "sdpa"),
        ({"rule": RULES["window"]}, "varlen"),
        ({"rule": RULES["window"], "half": False}, "flex"),
        ({"documents": True}, "varlen"),
        ({"rule": RULES["alibi"]}, "flex"),
        ({"rule": RULES["alibi"], "flash_attn": True}, "flash_attn"),
        ({"rule": RULES["alibi"], "flash_attn": True, "documents": True}, "flex"),
        ({"rule": RULES["alibi"], "plain_places": False}, "sdpa"),
        ({"rule": RULES["window"], "length": 1}, "sdpa"),
        ({"rule": RULES["window"], "keys": 400}, "sdpa"),
        ({"rule": Rule(0.3, 50, None, 0.1)}, "sdpa"),
        ({"rule": Rule(0.3, 5000)}, "sdpa"),
    ],
)
def test_choice(facts: dict[str, Any], taken: str) -> None:
    usual = {"half": True, "length": S, "keys": S, "rule": RULES["plain"], "documents": False, "plain_places": True}
    assert route(**{**usual, "flash_attn": False, "head_dim": 64, **facts}) == taken


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_on_a_gpu_with_gradients(name: str, packed: bool, dtype: torch.dtype) -> None:
    """Output and gradients of whatever is chosen, against the formula in fp32 on the same (rounded) inputs."""
    rule = Rule(0.3, RULES[name].window, None if RULES[name].slopes is None else RULES[name].slopes.cuda())
    places = documents("cuda") if packed else None
    results = []
    for run in (attention_fused, attention_reference):
        q, k, v = qkv("cuda", dtype)
        if run is attention_reference:
            q, k, v = (t.detach().float().requires_grad_() for t in (q, k, v))
        y = run(q, k, v, rule, places, True)
        results.append([y, *torch.autograd.grad(y.float().sin().sum(), (q, k, v))])
    limit = 2e-3 if dtype == torch.float32 else 3e-2  # TF32 products inside FlexAttention; bf16 rounding
    for got, want in zip(*results, strict=True):
        assert got.isfinite().all()
        assert (got.float() - want).abs().max() <= limit * max(1.0, float(want.abs().max()))
