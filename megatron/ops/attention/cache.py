"""What attention remembers: keys and values of earlier tokens, numbered within their row.

    keys, values [b, n, g, k]   keys are stored rotated     places [b, n]  position of each, -1 = no token
    seen [b]                    tokens of the row so far

Without a window n grows with the text; with one n is the window and never changes, the oldest entry making room. Padding,
on either side, is never numbered, so a row says the same alone and in a batch. Tensors that come in are not changed, but by
`mix_step_`, for which the window is a ring whose entries lie in any order.

A server that keeps keys and values in pages of its own gives an `OuterCache` for a state: `mix` then rotates, and the server
attends. So every layer that calls `mix` is served from pages without knowing of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.ops.attention.operator import Places, Rule, attention, attention_weights
from megatron.ops.context_shard import ContextShard
from megatron.ops.rotary import rotary_angles, rotary_table, rotate
from megatron.ops.window import window_step_


@dataclass(frozen=True)
class Mixing:
    """How a layer attends: the rule, and the rotary width (0 = none) and base.

    train_length: ALiBi slopes shrink by train_length / length once a row is longer (position interpolation, arXiv 2310.13017).
    """

    rule: Rule
    rotary: int = 0
    base: float = 10000.0
    train_length: int | None = None


class OuterCache(dict[str, Tensor]):
    """A state whose keys and values somebody else keeps.

    Attributes:
        places: [b, s], position of each new token within its text.
    """

    places: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, how: Mixing) -> Tensor:
        """Keep k and v [b, s, g, k], rotated; q [b, s, h, k] over all that is kept of each text -> y [b, s, h, k]."""
        raise NotImplementedError


def is_cache(state: Mapping[str, Tensor]) -> bool:
    """Whether a mixer's state is the keys and values of `mix` and nothing else."""
    return set(state) == {"keys", "values", "places", "seen"}


def empty_cache(
    batch: int, groups: int, width: int, window: int | None, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """The state before the first token."""
    n = window or 0
    return {
        "keys": torch.zeros(batch, n, groups, width, dtype=dtype, device=device),
        "values": torch.zeros(batch, n, groups, width, dtype=dtype, device=device),
        "places": torch.full((batch, n), -1, dtype=torch.long, device=device),
        "seen": torch.zeros(batch, dtype=torch.long, device=device),
    }


def _numbered(b: int, s: int, state: dict[str, Tensor] | None, mask: Tensor | None, device: torch.device) -> Tensor:
    """Position [b, s] of each new token within its row; padding repeats the position before it."""
    tokens = torch.ones(b, s, dtype=torch.long, device=device) if mask is None else mask.to(torch.long)
    places = (tokens.cumsum(1) - 1).clamp_min(0)
    return places if state is None else places + state["seen"][:, None]


def mix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    how: Mixing,
    state: dict[str, Tensor] | None = None,
    mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    backend: str = "auto",
    attentions: list[Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Attention of new tokens over themselves and the state: q [b, s, h, k], k and v [b, s, g, k] -> y [b, s, h, k], new state.

    mask [b, s]: 0 for padding. segment_ids [b, s]: document numbers; the state belongs to the first one's document.
    attentions: takes the weights [b, h, s, keys] where a list is given.
    """
    b, s = q.shape[:2]
    if isinstance(state, OuterCache):
        q, k = _turn(q, k, how, state.places)
        return state.attend(q, k, v, how), state
    if state is None and mask is None and segment_ids is None:
        q, k = _turn(q, k, how, None)
        return _attend(q, k, v, _rule(how, None, s), None, False, backend, attentions), None
    query = _numbered(b, s, state, mask, q.device)
    q, k = _turn(q, k, how, query)
    own = query if mask is None else query.masked_fill(mask == 0, -1)
    if state is None:
        places = Places(query, own, segment_ids, segment_ids)
        return _attend(q, k, v, _rule(how, places, s), places, True, backend, attentions), None
    keys, values = torch.cat([state["keys"].to(k.dtype), k], 1), torch.cat([state["values"].to(v.dtype), v], 1)
    past = state["places"]
    places = Places(query, torch.cat([past, own], 1))
    if segment_ids is not None:
        known = segment_ids[:, :1].expand(-1, past.shape[1])
        places = replace(places, query_segment=segment_ids, key_segment=torch.cat([known, segment_ids], 1))
    first = past.shape[1] == 0 and mask is None and segment_ids is None
    rule, where = _rule(how, places, s), None if first else places
    y = _attend(q, keys, values, rule, where, mask is None, backend, attentions)
    return y, _remember(keys, values, places, how.rule.window, state["seen"], mask, s)


def reads_halo(how: Mixing) -> bool:
    """Whether a context-parallel shard needs the keys and values of its window only, and not the whole row."""
    return how.rule.window is not None and how.train_length is None


def mix_shard(
    shard: ContextShard,
    query: Callable[[], Tensor],
    k: Tensor,
    v: Tensor,
    how: Mixing,
    backend: str = "auto",
) -> Tensor:
    """Attention of one context-parallel shard: q [b, s, h, k], k and v [b, s, g, k] -> y [b, s, h, k].

    With a window the `window` keys and values before the shard stand in front of its own, and tokens that it does not see are
    another document: a pass over a packed row, which the fused kernels take, whose first `window` queries are zeros and whose
    outputs are dropped. Rotary angles and linear biases depend on distances alone, so positions start at the halo. Without a
    window an all-to-all gives every rank all tokens of its own heads, and a second one returns the result: work is balanced
    although shards are contiguous, and attention itself is that of one device.

    Args:
        shard: of the row.
        query: computes q; called while keys and values of the window are on their way.
        k: keys.
        v: values.
        how: see `Mixing`.
        backend: path of the operator.
    """
    if reads_halo(how):
        window = how.rule.window or 0
        wait = shard.halo_async(torch.cat([k[:, -window:], v[:, -window:]], -1), window)
        q = F.pad(query(), (0, 0, 0, 0, window, 0))
        k, v = (torch.cat([before, own], 1) for before, own in zip(wait().chunk(2, -1), (k, v), strict=True))
        y, _ = mix(q, k, v, how, None, None, shard.ids_with_halo(window, k.shape[0]), backend)
        return y[:, window:]
    q = query()
    heads = [x.shape[2] // shard.size for x in (q, k, v)]
    blocks = torch.cat([x.unflatten(2, (shard.size, -1)) for x in (q, k, v)], 3)  # each rank's heads next to each other
    q, k, v = shard.to_heads(blocks.flatten(2, 3)).split(heads, dim=2)
    slopes = how.rule.slopes
    if slopes is not None:
        how = replace(how, rule=replace(how.rule, slopes=slopes[shard.rank * heads[0] : (shard.rank + 1) * heads[0]]))
    y, _ = mix(q, k, v, how, None, None, shard.segment_ids, backend)
    return shard.to_tokens(y)


def steps_in_place(how: Mixing, state: Mapping[str, Tensor]) -> bool:
    """Whether `mix_step_` can take a step over this state: a window above 0 without linear biases, kept here."""
    return bool(how.rule.window) and how.rule.slopes is None and not isinstance(state, OuterCache)


def mix_step_(q: Tensor, k: Tensor, v: Tensor, how: Mixing, state: dict[str, Tensor], backend: str = "auto") -> Tensor:
    """`mix` of one token per row, q [b, h, k], k and v [b, g, k] -> y [b, h, k]; the window in `state` is changed in place.

    Its entries are in any order afterwards: further steps in place read them, `mix` does not.
    """
    if how.rotary:
        q, k = (x.squeeze(1) for x in _turn(q.unsqueeze(1), k.unsqueeze(1), how, state["seen"][:, None]))
    ring = state["keys"], state["values"], state["places"], state["seen"]
    return window_step_(q, k, v, *ring, scale=how.rule.scale, backend=backend)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: Rule,
    places: Places | None,
    contiguous: bool,
    backend: str,
    attentions: list[Tensor] | None,
) -> Tensor:
    """`attention`; its weights are formed a second time, and only where they are asked for."""
    if attentions is not None:
        attentions.append(attention_weights(q, k, rule, places).to(q.dtype))
    return attention(q, k, v, rule, places, contiguous=contiguous, backend=backend)


def _turn(q: Tensor, k: Tensor, how: Mixing, places: Tensor | None) -> tuple[Tensor, Tensor]:
    if not how.rotary:
        return q, k
    if places is None:
        cos, sin = rotary_table(q.shape[1], how.rotary, how.base, q.dtype, q.device)
    else:
        cos, sin = rotary_angles(places, how.rotary, how.base, q.dtype)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def _rule(how: Mixing, places: Places | None, s: int) -> Rule:
    """The layer's rule, with slopes [b, h] that fit the rows' present length where interpolation is asked for."""
    slopes = how.rule.slopes
    if slopes is None or how.train_length is None:
        return how.rule
    if places is None:
        return replace(how.rule, slopes=slopes * min(1.0, how.train_length / s))
    if places.key_segment is not None:
        raise ValueError("slopes that shrink with a row's length (train_length) cannot tell its documents apart")
    length = places.key.amax(1, keepdim=True) + 1
    return replace(how.rule, slopes=slopes * (how.train_length / length.clamp_min(how.train_length)))


def _remember(
    keys: Tensor, values: Tensor, places: Places, window: int | None, seen: Tensor, mask: Tensor | None, s: int
) -> dict[str, Tensor]:
    """The state after these tokens: all of them, or the `window` last ones in their order."""
    numbers = places.key
    if places.key_segment is not None:  # an earlier document is out of sight for all that follows
        numbers = numbers.masked_fill(places.key_segment < places.key_segment.amax(1, keepdim=True), -1)
    if window is not None:
        if mask is None:
            cut = numbers.shape[1] - window
            keys, values, numbers = keys[:, cut:], values[:, cut:], numbers[:, cut:]
            if s > 1:  # not a view that keeps the whole pass alive
                keys, values, numbers = keys.clone(), values.clone(), numbers.clone()
        else:
            numbers, order = (t.flip(1) for t in numbers.topk(window, dim=1))
            index = order[:, :, None, None].expand(-1, -1, *keys.shape[2:])
            keys, values = keys.gather(1, index), values.gather(1, index)
    count = s if mask is None else mask.to(torch.long).sum(1)
    return {"keys": keys, "values": values, "places": numbers, "seen": seen + count}
