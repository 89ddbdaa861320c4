"""What a transformers user says beside the tokens (masks, positions, documents), turned into the mixers' own terms.

Nothing is swallowed: an argument that is not known is refused by name, a value that would not be honoured is refused with its
reason. Checks of values need the values: they are made in eager mode and left out under `torch.compile` and `torch.export`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.ops.opaque import values_visible

_WITHOUT_EFFECT = ("max_length_q", "max_length_k", "tokenizer", "assistant_tokenizer")
"""Known arguments that repeat what `cu_seq_lens_q` says, or that `generate` uses itself and hands on."""


def check_unknown(arguments: Mapping[str, Any], seen: int, length: int) -> None:
    """Refuse whatever is not None, False or 0 among the arguments that `forward` does not name.

    Args:
        arguments: the keyword arguments left over.
        seen: tokens in the cache.
        length: tokens of this pass.

    Raises:
        TypeError: an argument has no meaning here.
        ValueError: `cache_position`, `token_type_ids` or `is_causal` says something that will not happen.
    """
    for name, value in arguments.items():
        if value is None or name in _WITHOUT_EFFECT:
            continue
        if name == "cache_position":
            places = torch.arange(seen, seen + length, device=value.device)
            if values_visible(value) and not (value.shape == places.shape and bool((value == places).all())):
                raise ValueError(f"cache_position must be {seen} .. {seen + length - 1}, where the cache ends")
        elif name == "token_type_ids":
            if values_visible(value) and bool(value.any()):
                raise ValueError("token_type_ids other than 0 have no meaning for this model")
        elif name == "is_causal":
            if not value:
                raise ValueError("is_causal=False: this model reads from left to right only")
        elif value is not False:
            raise TypeError(f"forward() got an unknown argument '{name}'; nothing here would honour it")


def check_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
    """One of the two, in its shape, with something in it.

    Raises:
        ValueError: neither or both, another number of dimensions, no row or no token.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds")
    given = inputs_embeds if input_ids is None else input_ids
    name, dims = ("inputs_embeds", 3) if input_ids is None else ("input_ids", 2)
    if given is not None and (given.dim() != dims or 0 in given.shape):
        raise ValueError(f"{name} must have {dims} dimensions, rows and tokens first, none of them 0; got {tuple(given.shape)}")


def check_mask(attention_mask: Tensor | None, x: Tensor, seen: int = 0) -> Tensor | None:
    """The part [b, s] of a 0/1 mask that belongs to x [b, s, d]; None when it hides nothing, which is the faster case.

    Args:
        attention_mask: [b, s], or [b, seen + s] with the columns of earlier passes in front.
        x: the embedded tokens.
        seen: tokens in the cache.

    Raises:
        ValueError: another shape, or values besides 0 and 1 (additive masks, document numbers).
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2 or attention_mask.shape[1] < x.shape[1]:
        shape = tuple(getattr(attention_mask, "shape", ()))
        raise ValueError(f"attention_mask must be [batch, length] of 0 and 1, got {shape} for x {tuple(x.shape)}")
    if attention_mask.shape[0] != x.shape[0]:
        raise ValueError(f"attention_mask has {attention_mask.shape[0]} rows for {x.shape[0]} rows of tokens")
    if attention_mask.shape[1] not in (x.shape[1], seen + x.shape[1]):
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} columns for {x.shape[1]} tokens behind {seen} in the cache"
        )
    mask = attention_mask[:, -x.shape[1] :].to(x.device)
    if not values_visible(mask):
        return mask != 0
    shown = mask == 1
    all_shown, valid = torch.stack([shown.all(), (shown | (mask == 0)).all()]).tolist()
    if not valid:
        raise ValueError(
            "attention_mask must hold 0 (hidden) and 1 (shown) only; additive masks and document numbers are not understood: "
            "give position_ids, seq_idx or cu_seq_lens_q for packed documents"
        )
    return None if all_shown else shown


@dataclass(frozen=True)
class Documents:
    """Boundaries of packed documents as the three ways in which transformers' collators tell them.

    position_ids [b or 1, s] restart at each document; cu_seq_lens_q, cu_seq_lens_k [documents + 1] are offsets in the one row
    of a flattened batch; seq_idx [b or 1, s] numbers the documents.
    """

    position_ids: Tensor | None = None
    cu_seq_lens_q: Tensor | None = None
    cu_seq_lens_k: Tensor | None = None
    seq_idx: Tensor | None = None

    def segment_ids(self, mask: Tensor | None, x: Tensor, seen: int, before: Tensor | None = None) -> Tensor | None:
        """Document numbers [b, s] of x [b, s, d], growing by one at each boundary; None where there is one document.

        Args:
            mask: 1 for tokens, None for all; padding belongs to the document before it.
            x: the embedded tokens.
            seen: tokens in the cache, whose document the first token continues.
            before: from `tokens_before`.

        Raises:
            ValueError: shapes that do not fit, positions that neither count on nor restart, or boundaries that contradict each
                other.
        """
        if x.shape[1] == 1:
            return None
        told = {
            "position_ids": _borders_of_positions(self.position_ids, mask, x, before),
            "cu_seq_lens": self._borders_of_offsets(x, seen),
            "seq_idx": _borders_of_numbers(self.seq_idx, x),
        }
        boundaries = {name: boundary for name, boundary in told.items() if boundary is not None}
        if not boundaries:
            return None
        (first, boundary), *others = boundaries.items()
        if values_visible(x):
            for name, other in others:
                if not torch.equal(boundary, other):
                    raise ValueError(f"{first} and {name} put the boundaries of documents in different places")
            if not bool(boundary.any()):
                return None
        return boundary.long().cumsum(1)

    def _borders_of_offsets(self, x: Tensor, seen: int) -> Tensor | None:
        given = [t for t in (self.cu_seq_lens_q, self.cu_seq_lens_k) if t is not None]
        if not given:
            return None
        offsets = given[0]
        if x.shape[0] != 1 or offsets.dim() != 1:
            raise ValueError(f"cu_seq_lens_q describes one flattened row, got {x.shape[0]} rows")
        if values_visible(x):
            if seen or int(offsets[0]) != 0 or int(offsets[-1]) != x.shape[1] or bool((offsets.diff() < 0).any()):
                raise ValueError(f"cu_seq_lens_q must rise from 0 to the {x.shape[1]} tokens of this pass, without a cache")
            if not torch.equal(offsets, given[-1]):
                raise ValueError("cu_seq_lens_q and cu_seq_lens_k differ")
        places = torch.arange(x.shape[1], device=x.device)
        boundary = torch.isin(places, offsets[1:].to(x.device)) & (places > 0)
        return boundary[None]


def _row_wise(name: str, value: Tensor, x: Tensor) -> Tensor:
    """`value` [b or 1, s] as [b, s]."""
    if value.dim() != 2 or value.shape[1] != x.shape[1] or value.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"{name} must be {tuple(x.shape[:2])}, got {tuple(value.shape)}")
    return value.to(x.device).expand(x.shape[0], -1)


def _borders_of_numbers(seq_idx: Tensor | None, x: Tensor) -> Tensor | None:
    if seq_idx is None:
        return None
    numbers = _row_wise("seq_idx", seq_idx, x)
    return F.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0))


def _borders_of_positions(
    position_ids: Tensor | None, mask: Tensor | None, x: Tensor, continued: Tensor | None
) -> Tensor | None:
    """[b, s]: True where a document begins after the first token; positions of padding are not looked at."""
    if position_ids is None:
        return None
    places = _row_wise("position_ids", position_ids, x).long()
    shown = torch.ones_like(places, dtype=torch.bool) if mask is None else mask
    index = torch.where(shown, torch.arange(places.shape[1], device=x.device), -1)
    before = F.pad(index[:, :-1], (1, 0), value=-1).cummax(1).values  # the token before, padding left out
    previous = places.gather(1, before.clamp_min(0))
    later = shown & (before >= 0)
    boundary = later & (places <= previous)
    if values_visible(x):
        if bool((later & (places > previous + 1)).any()):
            raise ValueError("position_ids must count up by one inside a document; they skip some")
        if bool((boundary & (places != 0)).any()):
            raise ValueError("position_ids must count up by one, or restart at 0 where a document begins")
        first = shown & (before < 0) & (places == 0)
        if continued is not None and bool((first & (continued > 0)[:, None]).any()):
            raise ValueError("position_ids restart with the first token of a pass whose cache holds another document")
    return boundary


@dataclass(frozen=True)
class Compaction:
    """Real tokens moved to the front of their rows, padding behind them, so that no gap stands between neighbours.

    order, place [b, s]: which token stands where, and where a token has gone.
    """

    order: Tensor
    place: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Rows of x [b, s, ...] in the new order."""
        return _gathered(x, self.order)

    def undo(self, x: Tensor) -> Tensor:
        """Rows of x [b, s, ...] in the order in which they were given."""
        return _gathered(x, self.place)

    def undo_weights(self, weights: Tensor) -> Tensor:
        """Attention weights [b, h, s, keys], of which the last s keys are those of this pass, in the order given."""
        s, keys = weights.shape[2:]
        past, own = weights.split([keys - s, s], 3)
        own = own.gather(3, self.place[:, None, None].expand_as(own))
        return self.undo(torch.cat([past, own], 3).transpose(1, 2)).transpose(1, 2)


def _gathered(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))


def tokens_before(attention_mask: Tensor | None, x: Tensor, seen: int) -> Tensor | None:
    """Tokens [b] that each row's state has read before x [b, s, d], padding left out where the mask tells it; None for none.

    None for a single token too, which has no gap and no boundary: a decode step does not sum the mask of all steps before it.
    """
    if not seen or x.shape[1] == 1:
        return None
    if attention_mask is not None and attention_mask.shape[1] > x.shape[1]:
        return attention_mask[:, : -x.shape[1]].sum(1).to(x.device)
    return torch.full((x.shape[0],), seen, device=x.device)


def compaction(mask: Tensor | None, before: Tensor | None) -> Compaction | None:
    """How to close the holes of a mask [b, s]; None where there are none.

    Padding on the right, and on the left of an empty state, is what mixers handle themselves. Anything else would stand between
    a convolution's taps.

    Args:
        mask: of this pass, None when it hides nothing.
        before: from `tokens_before`.
    """
    if mask is None:
        return None
    if values_visible(mask):
        runs = (mask & ~F.pad(mask[:, :-1], (1, 0))).sum(1)
        continued = torch.zeros_like(runs) if before is None else before
        if not bool(((runs > 1) | ((runs == 1) & ~mask[:, 0] & (continued > 0))).any()):
            return None
    order = (~mask).long().argsort(dim=1, stable=True)
    return Compaction(order, order.argsort(dim=1))


def check_generation(arguments: Mapping[str, Any], cache: Any, prompt: int | None) -> None:
    """Refuse what `generate` would get wrong without a word.

    Args:
        arguments: what `generate` will hand to `forward`.
        cache: the `RecurrentCache` that it goes on from, None for a new text.
        prompt: columns of an attention mask of ones, which newer transformers leave out of the arguments.

    Raises:
        ValueError: padding behind a prompt, several documents in a prompt, or a cache that has read the whole prompt.
    """
    mask = arguments.get("attention_mask")
    packed = [name for name in ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k") if arguments.get(name) is not None]
    if packed:
        raise ValueError(f"generate continues one document per row; {packed[0]} tells of several")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        prompt = mask.shape[1]
        if bool(((mask[:, -1] == 0) & (mask != 0).any(1)).any()):
            raise ValueError("generate continues a row's last column, which is padding here: use padding_side='left'")
    seen = 0 if cache is None else cache.get_seq_length()
    if seen and prompt is not None and seen >= prompt:
        raise ValueError(
            f"the cache has read {seen} tokens and the prompt has {prompt}: there is nothing new to read. Continue from a "
            "cache with the text that it has read and at least one token more; keep a copy (cache.fork()) for other texts"
        )
