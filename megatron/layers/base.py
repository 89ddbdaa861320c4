"""The contract of a token mixer, on one page.

A mixer turns `x [b, s, d]` (already normed) into `y [b, s, d]`; norms, residuals and the MLP belong to the block around it.
It is written for one device. Two things make it run on many without a line about ranks in it:

* it never uses the global number of heads in `forward`: head counts come from its own parameters and the sizes of its own
  modules (`q_proj.out_features`), which `parallel/tensor.py` cuts by the layer's `plan()`. It calls its modules and does not
  read their weights, so that adapters, quantised weights and hooks of an exported model act (`ops/modules.py`);
* it calls `self.split(u)` once where work on separate heads begins and `self.join(y)` once where their partial sums meet.
  Both are the identity on one device; under tensor parallelism they carry the two all-reduces of Megatron.

Shapes, everywhere in this folder: b batch, s sequence, d hidden, h heads, k key width per head, v value width per head.
Files of this folder import torch, this page and `megatron.ops` only: `export/` packs their text into the checkpoint folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


@dataclass(frozen=True)
class LayerConfig:
    """What every mixer is told; the fields that a mixer adds in its nested `Config` become the YAML keys `<name>_<field>`.

    neox_keys: field -> GPT-NeoX key that gives the value where the field's own key is not set (an unset NeoX key gives none).
    """

    neox_keys: ClassVar[Mapping[str, str]] = {}

    hidden_size: int
    num_heads: int
    layer_index: int = 0

    def resolved(self) -> LayerConfig:
        """The same mixer with options that follow from others said, and options without effect at their defaults.

        Two configurations of one mixer compute the same if and only if they are equal after this.
        """
        return self


@dataclass(frozen=True)
class Context:
    """What travels beside the hidden states through all layers of one pass.

    mask: [b, s], 1 for a token and 0 for padding; None when there is no padding.
    segment_ids: [b, s] integers that grow by one at each document border; None when documents are not told apart.
    backend: which path of `ops/` is asked for: auto | reference | torch | triton | fla.
    prefix_length: tokens at the start of a sequence that prefix layers (`jrt`) read in both directions; None: as they are set.
    prefix_per_document: the prefix is counted from the start of each document instead of the sequence.
    in_place: `step` may overwrite the states that it is given (buffers of a captured graph); without it they are left alone.
    prefix_mask: [b, s], 0 for filler in front of a prompt as JRT decodes it: prefix layers hide its keys, all others take it
        for text (`mask` is what hides a token everywhere).
    attentions: where layers that have attention weights leave them, [b, h, s, keys], when a list is given.
    """

    mask: Tensor | None = None
    segment_ids: Tensor | None = None
    backend: str = "auto"
    prefix_length: int | None = None
    prefix_mask: Tensor | None = None
    in_place: bool = False
    prefix_per_document: bool = False
    attentions: list[Tensor] | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Context:
        """The same on another device: what accelerate calls where a model's layers lie on several."""
        tensors = (self.mask, self.segment_ids, self.prefix_mask)
        mask, ids, filler = (None if t is None else t.to(device, non_blocking=non_blocking) for t in tensors)
        return replace(self, mask=mask, segment_ids=ids, prefix_mask=filler)


class Layer(nn.Module):
    """Base of all token mixers.

    Class attributes: `names`, the words that select it in `attention_config` (the first is the prefix of its options);
    `uses_heads`, whether the number of heads means anything to it: a model of others may have any, and is cut by channels.
    `first_head` is the number, in the whole model, of the first head held here; `parallel/tensor.py` sets it. Only a layer
    whose heads differ by their number (ALiBi's slopes) reads it.
    """

    names: ClassVar[tuple[str, ...]] = ()
    uses_heads: ClassVar[bool] = True
    Config: ClassVar[type[LayerConfig]] = LayerConfig

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.config = config
        self.first_head = 0
        self.split: nn.Module = nn.Identity()
        self.join: nn.Module = nn.Identity()

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """Mix `x [b, s, d]` -> `y [b, s, d]`.

        With `state` (from `init_state` or an earlier call) the pass continues from it and the new state is returned; without,
        the history is empty and None is returned. `s` may be any length: `step` is the fast case s = 1. States that come in are
        never changed in place.
        """
        raise NotImplementedError

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """One decode step: `x [b, d]` -> `y [b, d]` and the new state; equal to `forward` on one token.

        With `ctx.in_place` the state may come back as the very tensors that were given, overwritten.
        """
        raise NotImplementedError

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> State:
        """The empty state: named tensors with the batch on dim 0, so that beam search can reorder them all alike."""
        raise NotImplementedError

    def plan(self) -> Mapping[str, str]:
        """Parameter name (relative to this layer) -> how it is cut: column | row | heads | replicated."""
        raise NotImplementedError

    def init_rules(self) -> Mapping[str, str]:
        """Parameter name -> initialiser role: input | output | zeros | ones | conv | ..., see `model/init.py`."""
        raise NotImplementedError

    def no_decay(self) -> tuple[str, ...]:
        """Parameters that weight decay leaves alone besides biases and norms."""
        return ()

    def lay_together(self) -> None:
        """Move parameters that a fused path reads as one to one place in memory; called once, after they have got values."""

    def flops(self, seq_length: int) -> float:
        """Forward floating point operations per token, projections included; a multiply-add counts 2."""
        raise NotImplementedError

    def state_size(self) -> Mapping[str, int]:
        """Elements per sequence of each state tensor, so that the recall-memory dial can be read off a config."""
        return {name: t.numel() for name, t in self.init_state(1, torch.float32, "meta").items()}

    def param_count(self) -> int:
        """Number of parameters of this mixer on one device."""
        return sum(p.numel() for p in self.parameters())

    @classmethod
    def build(cls, common: Mapping[str, Any], options: Mapping[str, Any]) -> Layer:
        """Make a mixer from the common fields and its own options; unknown options raise TypeError."""
        return cls(cls.Config(**common, **options))
