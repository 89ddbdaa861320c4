"""Attention on a GPU: which fused kernel can compute a case, and how it is asked for.

    causal over whole rows                         scaled_dot_product_attention (the plain path already takes its flash kernel)
    window, half precision, documents or none      torch.nn.attention.varlen
    ALiBi, half precision, flash-attn installed    flash_attn_func with its slopes, fp32 and positive, window included
    ALiBi or window otherwise                      FlexAttention, compiled; documents too
    caches, padding, dropout on weights            the plain path (window in blocks, ALiBi in columns)

None of these writes an [h, s, n] tensor. FlexAttention has no backward on CPUs, and its gradients were reported to be NaN at
lengths that are no multiple of 128 (pytorch#153799): rows are filled up to one. Imported by `dispatch` when a GPU is there.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from megatron.ops.attention.operator import Places, Rule, attention_torch
from megatron.ops.dispatch import path

_FLEX_BLOCK = 128
_BOUNDS: Any = WeakTensorKeyDictionary()
"""Segment ids -> (their version, bounds): all layers of a pass ask for the same, and counting documents waits for the GPU."""


def route(
    half: bool, length: int, keys: int, rule: Rule, documents: bool, plain_places: bool, flash_attn: bool, head_dim: int
) -> str:
    """Which kernel takes a case: sdpa | varlen | flash_attn | flex.

    half: 16-bit inputs. documents: rows hold several. plain_places: no padding and no cache. flash_attn: the package is there.
    """
    window = rule.window is not None and rule.window < keys - 1
    if not plain_places or length != keys or rule.dropout or length < 16:
        return "sdpa"
    if rule.slopes is None and not window and not documents:
        return "sdpa"
    if rule.slopes is None and half and head_dim % 8 == 0 and head_dim <= 256:
        return "varlen"
    if rule.slopes is not None and half and flash_attn and not documents and head_dim <= 256:
        return "flash_attn"
    return "flex"


@functools.cache
def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


@path("attention", "triton")
def attention_fused(q: Tensor, k: Tensor, v: Tensor, rule: Rule, places: Places | None, contiguous: bool) -> Tensor:
    """The case's fused kernel; see the head of this file."""
    plain = places is None or places.key is places.query
    documents = places is not None and places.query_segment is not None
    taken = route(q.element_size() == 2, q.shape[1], k.shape[1], rule, documents, plain, _has_flash_attn(), q.shape[-1])
    if taken == "varlen":
        return by_varlen(q, k, v, rule, places)
    if taken == "flash_attn":
        return by_flash_attn(q, k, v, rule)
    if taken == "flex":
        return by_flex(q, k, v, rule, places, _compiled_flex())
    return attention_torch(q, k, v, rule, places, contiguous)


def document_bounds(segments: Tensor | None, b: int, s: int, device: torch.device) -> Tensor:
    """Bounds of all documents of all rows in the flattened batch; formed once for one tensor of segment ids.

    Args:
        segments: document numbers [b, s], or None for one document per row.
        b: rows.
        s: tokens per row.
        device: where to put them without segments.

    Returns:
        int32 0, ..., b * s; a row's start is always one.
    """
    if segments is None:
        return torch.arange(0, (b + 1) * s, s, dtype=torch.int32, device=device)
    version = None if segments.is_inference() else segments._version
    known = _BOUNDS.get(segments)
    if known is None or known[0] != version:
        boundary = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
        starts = boundary.flatten().nonzero().flatten().to(torch.int32)
        known = _BOUNDS[segments] = (version, F.pad(starts, (0, 1), value=b * s))
    bounds: Tensor = known[1]
    return bounds


@functools.cache
def _takes_grouped_heads(attention: Callable[..., Any]) -> bool:
    return "enable_gqa" in inspect.signature(attention).parameters


def by_varlen(q: Tensor, k: Tensor, v: Tensor, rule: Rule, places: Places | None) -> Tensor:
    """PyTorch's packed attention: tokens of all rows side by side, documents by their bounds."""
    from torch.nn.attention.varlen import varlen_attn

    b, s = q.shape[:2]
    bounds = document_bounds(None if places is None else places.query_segment, b, s, q.device)
    q, k, v = (t.flatten(0, 1).contiguous() for t in (q, k, v))
    window = (-1 if rule.window is None else rule.window, 0)
    grouped: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if _takes_grouped_heads(varlen_attn):
            grouped["enable_gqa"] = True
        else:  # torch before 2.12 takes as many heads of keys as of queries
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    y = varlen_attn(q, k, v, bounds, bounds, s, s, scale=rule.scale, window_size=window, **grouped)
    assert isinstance(y, Tensor)
    return y.unflatten(0, (b, s))


def by_flash_attn(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """The flash-attn package: slopes are positive, fp32 and relative to scaled scores."""
    slopes = None if rule.slopes is None else rule.slopes.float().contiguous()
    window = (-1 if rule.window is None else rule.window, 0 if rule.window is not None else -1)
    y: Tensor = importlib.import_module("flash_attn").flash_attn_func(
        q, k, v, softmax_scale=rule.scale, causal=True, window_size=window, alibi_slopes=slopes
    )
    return y


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def by_flex(q: Tensor, k: Tensor, v: Tensor, rule: Rule, places: Places | None, run: Callable[..., Any]) -> Tensor:
    """FlexAttention: the bias as a change of scores, window and documents as a mask of blocks. run: flex_attention itself."""
    s = q.shape[1]
    fill = -s % _FLEX_BLOCK
    heads_first = [F.pad(t, (0, 0, 0, 0, 0, fill)).transpose(1, 2) for t in (q, k, v)]
    segments = None if places is None else places.query_segment
    if segments is None:
        mask = _block_mask(s + fill, rule.window, q.device)
    else:
        mask = _document_mask(F.pad(segments, (0, fill), value=-1), rule.window)
    grouped = q.shape[2] != k.shape[2]
    y = run(*heads_first, score_mod=_score(rule.slopes), block_mask=mask, scale=rule.scale, enable_gqa=grouped)
    assert isinstance(y, Tensor)
    return y.transpose(1, 2)[:, :s]


def _score(slopes: Tensor | None) -> Callable[..., Tensor] | None:
    if slopes is None:
        return None
    if slopes.dim() == 1:
        return lambda score, b, h, i, j: score - slopes[h] * (i - j)
    return lambda score, b, h, i, j: score - slopes[b, h] * (i - j)


def _visible(window: int | None) -> Callable[..., Tensor]:
    """Causal, and within the window. Rows of filling see themselves, so that no row is empty."""
    if window is None:
        return lambda b, h, i, j: i >= j
    return lambda b, h, i, j: (i >= j) & (i - j <= window)


@functools.lru_cache(maxsize=16)
def _block_mask(length: int, window: int | None, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    with torch.inference_mode(False):
        return create_block_mask(_visible(window), None, None, length, length, device=str(device))


def _document_mask(segments: Tensor, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    near, (b, length) = _visible(window), segments.shape

    def same(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return near(b, h, i, j) & (segments[b, i] == segments[b, j])

    return create_block_mask(same, b, None, length, length, device=str(segments.device))
