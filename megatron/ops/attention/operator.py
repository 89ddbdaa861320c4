"""Causal softmax attention with an optional window, ALiBi and per-row positions.

    score(i, j) = scale q_i.k_j - m_h (p_i - p_j)      over keys with 0 <= p_i - p_j <= window, of the same document
    y_i = softmax_j(score) v_j                         p: position of a token within its row; m: slopes (arXiv 2108.12409)

`window` counts previous tokens: a query sees window + 1 keys (flash-attn's and GPT-NeoX's convention). The bias is relative to
scaled scores, is formed in fp32 from distances and never dropped out. A query without any visible key (padding) gets finite,
meaningless numbers. Under autocast q, k and v are taken in its format, as by PyTorch's own operator, before all else.
Shapes: q [b, s, h, k], keys and values [b, n, g, k] with h a multiple of g (grouped queries), the last s of the n keys being
the queries' own; slopes [h] or [b, h].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.ops.dispatch import choose, path
from megatron.ops.precision import autocast_dtype, outside_autocast, sum_dtype

_SHORT = 16
"""Up to so many queries the bias is written out; beyond, ALiBi rides in extra columns and no [h, s, n] tensor exists."""


def alibi_slopes(heads: int, bias_max: float = 8.0) -> list[float]:
    """The slope of every head: 2^(-bias_max k / n) for a power of two n, else those of the next lower power of two p, followed
    by every second one of 2p. `heads` is the number of the whole model, not of one rank.
    """
    p = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-bias_max * k / p) for k in range(1, p + 1)]
    return slopes + [2.0 ** (-bias_max * k / (2 * p)) for k in range(1, 2 * (heads - p), 2)]


@dataclass(frozen=True)
class Places:
    """Where tokens stand, when that is not simply 0, 1, 2, ... in every row.

    query [b, s], key [b, n]: positions within the row; a key of position -1 is seen by nobody.
    query_segment, key_segment: document numbers of the same shapes, None when documents are not told apart.
    """

    query: Tensor
    key: Tensor
    query_segment: Tensor | None = None
    key_segment: Tensor | None = None


@dataclass(frozen=True)
class Rule:
    """What a layer says of its attention: see the head of this file. dropout acts on the weights after the softmax."""

    scale: float
    window: int | None = None
    slopes: Tensor | None = None
    dropout: float = 0.0


def visible(places: Places, window: int | None) -> Tensor:
    """[b, 1, s, n]: may query i look at key j? A query that may look at nothing looks at everything: padding, and no NaN."""
    distance = places.query[:, :, None] - places.key[:, None, :]
    seen = (distance >= 0) & (places.key >= 0)[:, None, :]
    if window is not None:
        seen = seen & (distance <= window)
    if places.query_segment is not None and places.key_segment is not None:
        seen = seen & (places.query_segment[:, :, None] == places.key_segment[:, None, :])
    return _never_empty(seen)[:, None]


def _never_empty(seen: Tensor) -> Tensor:
    return seen | ~seen.any(-1, keepdim=True)


def _counted(b: int, s: int, n: int, device: torch.device) -> Places:
    """The usual places, written out."""
    key = torch.arange(n, device=device).expand(b, n)
    return Places(key[:, n - s :], key)


def _bias(slopes: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """[1 or b, h, s, n] of -m (p_i - p_j) in the slopes' dtype; places ahead, which are hidden, get 0."""
    distance = (query[:, None, :, None] - key[:, None, None, :]).clamp_min(0)
    return slopes.reshape(-1, slopes.shape[-1], 1, 1) * -distance.to(slopes.dtype)


@outside_autocast
def attention_weights(q: Tensor, k: Tensor, rule: Rule, places: Places | None) -> Tensor:
    """Softmax weights [b, h, s, n] by the formula above, in fp32 (fp64 for fp64), before dropout."""
    b, s, h, _ = q.shape
    where = _counted(b, s, k.shape[1], q.device) if places is None else places
    wide = sum_dtype(q.dtype)
    keys = k.to(wide).repeat_interleave(h // k.shape[2], dim=2)
    scores = torch.einsum("bshk,bnhk->bhsn", q.to(wide), keys) * rule.scale
    if rule.slopes is not None:
        scores = scores + _bias(rule.slopes.to(wide), where.query, where.key)
    return scores.masked_fill(~visible(where, rule.window), -torch.inf).softmax(-1)


@path("attention", "reference")
def attention_reference(q: Tensor, k: Tensor, v: Tensor, rule: Rule, places: Places | None, contiguous: bool) -> Tensor:
    """The formula above, written out."""
    weights = attention_weights(q, k, rule, places)
    values = v.to(weights.dtype).repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    if rule.dropout:
        weights = F.dropout(weights, rule.dropout)
    return torch.einsum("bhsn,bnhk->bshk", weights, values).to(q.dtype)


@path("attention", "torch")
def attention_torch(q: Tensor, k: Tensor, v: Tensor, rule: Rule, places: Places | None, contiguous: bool) -> Tensor:
    """PyTorch's scaled_dot_product_attention; windows in blocks, so that their cost does not grow with the square of s."""
    s, n, w = q.shape[1], k.shape[1], rule.window
    # in blocks a query meets its block and the window, else (behind a mask) every key: copies are worth it from half of them on
    if w is not None and not _any_length() and s > _SHORT and 2 * (max(w, 64) + w) <= n and (places is None or contiguous):
        return _banded(q, k, v, rule, places)
    if w is not None and places is None and (_any_length() or w < n - 1):
        places = _counted(1, s, n, q.device)
    if places is None:
        y = _sdpa(*_heads_first(q, k, v), None, None, rule)
    else:
        y = _sdpa(*_heads_first(q, k, v), visible(places, w), places, rule)
    return y.transpose(1, 2)


def _any_length() -> bool:
    """Whether the form must not depend on the length: an exported graph, where one serves them all and a window is a mask."""
    return torch.compiler.is_exporting()


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, places: Places | None, rule: Rule) -> Tensor:
    """[b, h, s, k] attention; mask None is the causal triangle over s = n, or a single query that sees all."""
    s, n, width = q.shape[2], k.shape[2], q.shape[3]
    bias = None
    if rule.slopes is not None and (_any_length() or s > _SHORT):
        key = torch.arange(n, device=k.device).unsqueeze(0) if places is None else places.key
        q, k = alibi_columns(q, k, rule.slopes, key, rule.scale)
        v = F.pad(v, (0, q.shape[-1] - width))  # the fused kernels want one width for all three
    elif rule.slopes is not None:
        where = _counted(1, s, n, q.device) if places is None else places
        bias = _bias(rule.slopes, where.query, where.key)
        seen = visible(where, rule.window) if mask is None else mask
        mask = bias.masked_fill(~seen, -torch.inf).to(q.dtype)
    causal = False
    if mask is None and s > 1:  # a branch: a compiler for lengths not known yet has no truth value to hand on
        causal = True
        if s != n:
            raise ValueError(f"{s} queries over {n} keys need their places")
    grouped = k.shape[1] != q.shape[1]
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=rule.dropout, is_causal=causal, scale=rule.scale, enable_gqa=grouped
    )
    return y[..., :width]


def alibi_columns(q: Tensor, k: Tensor, slopes: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q and k [b, h or g, s or n, k] with columns whose product is m j / scale: ALiBi for a kernel that knows no bias.

    +m j differs from -m (i - j) by a constant per query, which the softmax cancels. j is written in digits of base 256, exact
    in any dtype; in half precision the slope is split in two parts, since one would be off by up to 2^-9 of it.
    Widths are filled up to a multiple of 8, as fused kernels want them.
    """
    slope = slopes.reshape(-1, slopes.shape[-1], 1, 1).expand(q.shape[0], -1, -1, -1) / scale
    parts = [slope.to(q.dtype)]
    if q.element_size() == 2:
        parts.append((slope - parts[0].to(slope.dtype)).to(q.dtype))
    digits, weights, rest = [], [], key.clamp_min(0)
    for power in range(2 if k.shape[2] <= 65536 else 3):
        digits.append(rest % 256)
        weights.append(256**power)
        rest = rest // 256
    columns = [part * weight for part in parts for weight in weights]
    counts = torch.stack([d for _ in parts for d in digits], dim=-1).to(k.dtype)[:, None]
    fill = -(q.shape[-1] + len(columns)) % 8
    extra_q = F.pad(torch.cat(columns, dim=-1), (0, fill)).expand(-1, q.shape[1], q.shape[2], -1)
    extra_k = F.pad(counts, (0, fill)).expand(k.shape[0], k.shape[1], -1, -1)
    return torch.cat([q, extra_q], dim=-1), torch.cat([k, extra_k], dim=-1)


def _banded(q: Tensor, k: Tensor, v: Tensor, rule: Rule, places: Places | None) -> Tensor:
    """A window in blocks of queries, each with its own keys and the `window` before them: cost s (block + window).

    The tokens of a row must stand next to each other, as they do unless padding lies between cached and new ones.
    """
    b, s = q.shape[:2]
    n, w = k.shape[1], rule.window or 0
    block = min(max(w, 64), s)
    count = -(-s // block)
    before, after = max(0, w - (n - s)), count * block - s
    drop = max(0, n - s - w)
    q = F.pad(q, (0, 0, 0, 0, 0, after)).unflatten(1, (count, block)).flatten(0, 1)
    keys, values = (_windows(F.pad(t[:, drop:], (0, 0, 0, 0, before, after)), block, w) for t in (k, v))
    rows = torch.arange(block, device=q.device)[:, None]
    cols = torch.arange(block + w, device=q.device)[None]
    band = (cols >= rows) & (cols <= rows + w)  # column r + w is query r itself
    real = torch.ones(1, n - drop, dtype=torch.bool, device=q.device) if places is None else places.key[:, drop:] >= 0
    seen = band & _windows(F.pad(real, (before, after)), block, w)[:, None]
    if places is not None and places.query_segment is not None and places.key_segment is not None:
        own = F.pad(places.query_segment, (0, after)).unflatten(1, (count, block)).flatten(0, 1)
        seen = seen & (own[:, :, None] == _windows(F.pad(places.key_segment[:, drop:], (before, after)), block, w)[:, None])
    mask = _never_empty(seen)[:, None]
    if len(mask) != len(q):
        mask = mask.repeat(b, 1, 1, 1)
    slopes = rule.slopes
    if slopes is not None and slopes.dim() == 2:
        slopes = slopes.repeat_interleave(count, dim=0)
    local = Rule(rule.scale, None, slopes, rule.dropout)
    y = _sdpa(*_heads_first(q, keys, values), mask, Places(rows.T + w, cols), local)
    return y.transpose(1, 2).unflatten(0, (b, count)).flatten(1, 2)[:, :s]


def _windows(x: Tensor, block: int, window: int) -> Tensor:
    """[b, w + c block, ...] -> [b c, block + w, ...]: every block with the `window` entries before it."""
    cut = x.unfold(1, block + window, block)
    return cut.movedim(-1, 2).flatten(0, 1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: Rule,
    places: Places | None = None,
    *,
    contiguous: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`y [b, s, h, k]`; see the head of this file.

    places: None when every row counts 0, 1, ... and its last s keys are the queries' own. contiguous: the real tokens of every
    row stand next to each other among its keys.
    """
    narrow = autocast_dtype(q.device)
    if narrow is not None and q.dtype != torch.float64:
        q, k, v = q.to(narrow), k.to(narrow), v.to(narrow)
    return _attention(q, k, v, rule, places, contiguous, backend)


@outside_autocast
def _attention(q: Tensor, k: Tensor, v: Tensor, rule: Rule, places: Places | None, contiguous: bool, backend: str) -> Tensor:
    return choose("attention", backend, q.device)(q, k, v, rule, places, contiguous)
