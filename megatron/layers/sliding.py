"""Softmax attention over a short window: Based's local layer (arXiv 2402.18668), and a baseline.

A token sees itself and the `window` tokens before it. Rotary positions over the whole head, no biases: the form of the released
Based models, whose `window_size` counts both sides and is halved on import (256 there is 128 here: 129 keys).
Its state is the window, of constant size. `layers/softmax.py` has the general layer; this one is separate
because exported folders pack each mixer's file without the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from megatron.layers.base import Context, Layer, LayerConfig, State
from megatron.ops.attention import Rule
from megatron.ops.attention.cache import Mixing, empty_cache, mix, mix_shard, mix_step_, steps_in_place
from megatron.ops.rotary import rotary_width


class SlidingAttention(Layer):
    """Causal attention with a window, rotary positions and no biases."""

    names: ClassVar[tuple[str, ...]] = ("sliding",)
    context_parallel: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Config(LayerConfig):
        """Options of a sliding-window layer."""

        neox_keys: ClassVar[Mapping[str, str]] = {
            "window": "sliding_window_width",
            "rotary_base": "rotary_emb_base",
            "dropout": "attention_dropout",
        }

        window: int = 128
        """Previous tokens that a token sees in addition to itself."""
        rotary_fraction: float = 1.0
        """Fraction of each head that is rotated; 0 for no positions."""
        rotary_base: float = 10000.0
        """Base of the rotary frequencies."""
        dropout: float = 0.0
        """Dropout on attention weights in training."""

        def resolved(self) -> LayerConfig:
            """Without rotation, resets its base."""
            return self if self.rotary_fraction else replace(self, rotary_base=10000.0)

        def cp_halo(self) -> int:
            """Keys and values of the window."""
            return self.window

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        d, h = config.hidden_size, config.num_heads
        if d % h or config.window < 1:
            raise ValueError(f"sliding needs hidden_size {d} divisible by {h} heads and window {config.window} above 0")
        self.options = config
        self.head_dim = d // h
        self.rotary = rotary_width(self.head_dim, config.rotary_fraction) if config.rotary_fraction else 0
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, d, bias=False)
        self.v_proj = nn.Linear(d, d, bias=False)
        self.out_proj = nn.Linear(d, d, bias=False)

    def _heads(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [..., h, k] of u [..., d]."""
        return self._by_head(self.q_proj, u), self._by_head(self.k_proj, u), self._by_head(self.v_proj, u)

    def _by_head(self, projection: nn.Linear, u: Tensor) -> Tensor:
        return projection(u).unflatten(-1, (-1, self.head_dim))

    def _mixing(self) -> Mixing:
        dropout = self.options.dropout if self.training else 0.0
        rule = Rule(1 / math.sqrt(self.head_dim), self.options.window, dropout=dropout)
        return Mixing(rule, self.rotary, self.options.rotary_base)

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """`x [b, s, d]` -> `y [b, s, d]`; see `Layer.forward`."""
        u = self.copy_to_tp(x)
        if ctx.cp is not None:
            k, v = self._by_head(self.k_proj, u), self._by_head(self.v_proj, u)
            y = mix_shard(ctx.cp, lambda: self._by_head(self.q_proj, u), k, v, self._mixing(), ctx.backend)
        else:
            y, state = mix(*self._heads(u), self._mixing(), state, ctx.mask, ctx.segment_ids, ctx.backend, ctx.attentions)
        return self.reduce_from_tp(self.out_proj(y.flatten(-2))), state

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """`x [b, d]` -> `y [b, d]`: one query over the window; see `Layer.step`. In place the window is a ring."""
        mixing = self._mixing()
        if ctx.in_place and ctx.attentions is None and not mixing.rule.dropout and steps_in_place(mixing, state):
            y = mix_step_(*self._heads(self.copy_to_tp(x)), mixing, state, ctx.backend)
            return self.reduce_from_tp(self.out_proj(y.flatten(-2))), state
        y, after = self.forward(x.unsqueeze(1), Context(backend=ctx.backend, attentions=ctx.attentions), state)
        assert after is not None
        return y.squeeze(1), after

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> State:
        """An empty window: see `ops/attention/cache.py`."""
        groups = self.k_proj.out_features // self.head_dim
        return empty_cache(batch, groups, self.head_dim, self.options.window, dtype, device)

    def draws_random(self) -> bool:
        """With dropout."""
        return self.options.dropout > 0

    def plan(self) -> Mapping[str, str]:
        """Sharded by head."""
        return {f"{p}.weight": "column" for p in ("q_proj", "k_proj", "v_proj")} | {"out_proj.weight": "row"}

    def init_rules(self) -> Mapping[str, str]:
        """Input matrices, and the output projection scaled down by depth (Based's rule)."""
        return {f"{p}.weight": "input" for p in ("q_proj", "k_proj", "v_proj")} | {"out_proj.weight": "output"}

    def flops(self, seq_length: int) -> float:
        """Projections 8 d^2, and two products with the visible keys."""
        d, w = self.options.hidden_size, min(self.options.window, seq_length - 1)
        return 8.0 * d * d + 4.0 * d * (w + 1) * (1 - w / (2 * seq_length))
