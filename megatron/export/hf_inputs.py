"""Converts transformers' inputs (masks, positions, packed documents) to the mixers' own form.

Nothing is ignored silently: an unknown argument is refused by name, a value that cannot be honoured is refused with a
reason. Value checks run in eager mode only; `torch.compile` and `torch.export` skip them.
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
"""Known arguments that duplicate `cu_seq_lens_q`, or that `generate` uses itself and passes on."""


def check_unknown(arguments: Mapping[str, Any], seen: int, length: int) -> None:
    """Refuse arguments that `forward` does not name, unless they are None, False or 0.

    Args:
        arguments: the remaining keyword arguments.
        seen: tokens in the cache.
        length: tokens of this pass.

    Raises:
        TypeError: an argument has no meaning here.
        ValueError: the value of `cache_position`, `token_type_ids` or `is_causal` is not supported.
    """
    for name, value in arguments.items():
        if value is None or name in _WITHOUT_EFFECT:
            continue
        if name == "cache_position":
            positions = torch.arange(seen, seen + length, device=value.device)
            if values_visible(value) and not (value.shape == positions.shape and bool((value == positions).all())):
                raise ValueError(f"cache_position must be {seen} .. {seen + length - 1}, where the cache ends")
        elif name == "token_type_ids":
            if values_visible(value) and bool(value.any()):
                raise ValueError("token_type_ids other than 0 have no meaning for this model")
        elif name == "is_causal":
            if not value:
                raise ValueError("is_causal=False: this model reads from left to right only")
        elif value is not False:
            raise TypeError(f"forward() got an unknown argument '{name}'; this model does not support it")


def check_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
    """Require exactly one of the two arguments, non-empty and of the right rank.

    Raises:
        ValueError: neither or both are given, the number of dimensions is wrong, or there is no row or no token.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds")
    inputs = inputs_embeds if input_ids is None else input_ids
    name, dims = ("inputs_embeds", 3) if input_ids is None else ("input_ids", 2)
    if inputs is not None and (inputs.dim() != dims or 0 in inputs.shape):
        raise ValueError(f"{name} must have {dims} dimensions, rows and tokens first, none 0; got {tuple(inputs.shape)}")


def check_mask(attention_mask: Tensor | None, x: Tensor, seen: int = 0) -> Tensor | None:
    """The columns [b, s] of a 0/1 mask that belong to x [b, s, d]; None if it masks nothing, which is faster.

    Args:
        attention_mask: [b, s], or [b, seen + s] with the columns of earlier passes first.
        x: the embedded tokens.
        seen: tokens in the cache.

    Raises:
        ValueError: another shape, or values other than 0 and 1 (additive masks, document numbers).
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
            f"attention_mask has {attention_mask.shape[1]} columns for {x.shape[1]} tokens after {seen} in the cache"
        )
    mask = attention_mask[:, -x.shape[1] :].to(x.device)
    if not values_visible(mask):
        return mask != 0
    shown = mask == 1
    all_shown, valid = torch.stack([shown.all(), (shown | (mask == 0)).all()]).tolist()
    if not valid:
        raise ValueError(
            "attention_mask must hold 0 (masked) and 1 (visible) only; additive masks and document numbers are not supported: "
            "give position_ids, seq_idx or cu_seq_lens_q for packed documents"
        )
    return None if all_shown else shown


@dataclass(frozen=True)
class Documents:
    """Boundaries of packed documents, in the three forms of transformers' collators.

    Attributes:
        position_ids: [b or 1, s], restart at each document.
        cu_seq_lens_q: [documents + 1], offsets in the single row of a flattened batch.
        cu_seq_lens_k: must equal cu_seq_lens_q.
        seq_idx: [b or 1, s], document numbers.
    """

    position_ids: Tensor | None = None
    cu_seq_lens_q: Tensor | None = None
    cu_seq_lens_k: Tensor | None = None
    seq_idx: Tensor | None = None

    def segment_ids(self, mask: Tensor | None, x: Tensor, seen: int, before: Tensor | None = None) -> Tensor | None:
        """Document numbers [b, s] of x [b, s, d], increasing by one at each boundary; None if there is one document.

        Args:
            mask: [b, s], 1 for tokens, None for all; padding belongs to the preceding document.
            x: the embedded tokens.
            seen: tokens in the cache; the first token continues their document.
            before: [b], from `tokens_before`.

        Raises:
            ValueError: shapes do not match, positions neither count up nor restart, or boundaries contradict each other.
        """
        if x.shape[1] == 1:
            return None
        candidates = {
            "position_ids": _boundaries_of_positions(self.position_ids, mask, x, before),
            "cu_seq_lens": self._boundaries_of_offsets(x, seen),
            "seq_idx": _boundaries_of_numbers(self.seq_idx, x),
        }
        boundaries = {name: boundary for name, boundary in candidates.items() if boundary is not None}
        if not boundaries:
            return None
        (first, boundary), *others = boundaries.items()
        if values_visible(x):
            for name, other in others:
                if not torch.equal(boundary, other):
                    raise ValueError(f"{first} and {name} put document boundaries at different positions")
            if not bool(boundary.any()):
                return None
        return boundary.long().cumsum(1)

    def _boundaries_of_offsets(self, x: Tensor, seen: int) -> Tensor | None:
        offset_tensors = [t for t in (self.cu_seq_lens_q, self.cu_seq_lens_k) if t is not None]
        if not offset_tensors:
            return None
        offsets = offset_tensors[0]
        if x.shape[0] != 1 or offsets.dim() != 1:
            raise ValueError(f"cu_seq_lens_q describes one flattened row, got {x.shape[0]} rows")
        if values_visible(x):
            if seen or int(offsets[0]) != 0 or int(offsets[-1]) != x.shape[1] or bool((offsets.diff() < 0).any()):
                raise ValueError(f"cu_seq_lens_q must increase from 0 to the {x.shape[1]} tokens of this pass, without a cache")
            if not torch.equal(offsets, offset_tensors[-1]):
                raise ValueError("cu_seq_lens_q and cu_seq_lens_k differ")
        positions = torch.arange(x.shape[1], device=x.device)
        boundary = torch.isin(positions, offsets[1:].to(x.device)) & (positions > 0)
        return boundary[None]


def _row_wise(name: str, value: Tensor, x: Tensor) -> Tensor:
    """`value` [b or 1, s] as [b, s]."""
    if value.dim() != 2 or value.shape[1] != x.shape[1] or value.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"{name} must be {tuple(x.shape[:2])}, got {tuple(value.shape)}")
    return value.to(x.device).expand(x.shape[0], -1)


def _boundaries_of_numbers(seq_idx: Tensor | None, x: Tensor) -> Tensor | None:
    if seq_idx is None:
        return None
    numbers = _row_wise("seq_idx", seq_idx, x)
    return F.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0))


def _boundaries_of_positions(
    position_ids: Tensor | None, mask: Tensor | None, x: Tensor, continued: Tensor | None
) -> Tensor | None:
    """[b, s] bool: True where a document begins after the first token; ignores positions of padding."""
    if position_ids is None:
        return None
    positions = _row_wise("position_ids", position_ids, x).long()
    shown = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask
    index = torch.where(shown, torch.arange(positions.shape[1], device=x.device), -1)
    before = F.pad(index[:, :-1], (1, 0), value=-1).cummax(1).values  # index of the previous token, without padding
    previous = positions.gather(1, before.clamp_min(0))
    later = shown & (before >= 0)
    boundary = later & (positions <= previous)
    if values_visible(x):
        if bool((later & (positions > previous + 1)).any()):
            raise ValueError("position_ids must count up by one inside a document; they skip values")
        if bool((boundary & (positions != 0)).any()):
            raise ValueError("position_ids must count up by one, or restart at 0 where a document begins")
        first = shown & (before < 0) & (positions == 0)
        if continued is not None and bool((first & (continued > 0)[:, None]).any()):
            raise ValueError("position_ids restart with the first token of a pass whose cache holds another document")
    return boundary


@dataclass(frozen=True)
class Compaction:
    """A permutation that moves tokens to the front of their rows and padding to the end, so that no gap separates neighbours.

    Attributes:
        order: [b, s], old position of each new position.
        inverse: [b, s], new position of each old position.
    """

    order: Tensor
    inverse: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Permute rows of x [b, s, ...]."""
        return _gathered(x, self.order)

    def undo(self, x: Tensor) -> Tensor:
        """Restore the original order of rows of x [b, s, ...]."""
        return _gathered(x, self.inverse)

    def undo_weights(self, weights: Tensor) -> Tensor:
        """Restore the original order of attention weights [b, h, s, keys], whose last s keys are those of this pass."""
        s, keys = weights.shape[2:]
        past, current = weights.split([keys - s, s], 3)
        current = current.gather(3, self.inverse[:, None, None].expand_as(current))
        return self.undo(torch.cat([past, current], 3).transpose(1, 2)).transpose(1, 2)


def _gathered(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))


def tokens_before(attention_mask: Tensor | None, x: Tensor, seen: int) -> Tensor | None:
    """Tokens [b] that each row's state has read before x [b, s, d], without padding if the mask covers it; None for none.

    None for a single token too, which has no gap and no boundary: a decode step must not sum the mask of all earlier steps.
    """
    if not seen or x.shape[1] == 1:
        return None
    if attention_mask is not None and attention_mask.shape[1] > x.shape[1]:
        return attention_mask[:, : -x.shape[1]].sum(1).to(x.device)
    return torch.full((x.shape[0],), seen, device=x.device)


def compaction(mask: Tensor | None, before: Tensor | None) -> Compaction | None:
    """The permutation that closes the gaps of a mask [b, s]; None if there are none.

    Mixers handle padding on the right, and on the left of an empty state. Any other padding would fall inside a convolution's
    kernel.

    Args:
        mask: mask of this pass, None if it masks nothing.
        before: [b], from `tokens_before`.
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
    """Refuse inputs that `generate` would silently get wrong.

    Args:
        arguments: the arguments that `generate` will pass to `forward`.
        cache: the `RecurrentCache` to continue from, None for a new text.
        prompt: columns of an attention mask of ones, which newer transformers omit from the arguments.

    Raises:
        ValueError: padding after a prompt, several documents in a prompt, or a cache that has read the complete prompt.
    """
    mask = arguments.get("attention_mask")
    packed = [name for name in ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k") if arguments.get(name) is not None]
    if packed:
        raise ValueError(f"generate continues one document per row; {packed[0]} describes several")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        prompt = mask.shape[1]
        if bool(((mask[:, -1] == 0) & (mask != 0).any(1)).any()):
            raise ValueError("generate continues a row's last column, which is padding here: use padding_side='left'")
    seen = 0 if cache is None else cache.get_seq_length()
    if seen and prompt is not None and seen >= prompt:
        raise ValueError(
            f"the cache has read {seen} tokens and the prompt has {prompt}: there is nothing new to read. Continue from the "
            "cache with the text it has read plus at least one token; keep a copy (cache.fork()) for other texts"
        )
