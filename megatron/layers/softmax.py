"""Softmax attention: GPT-NeoX's `global` and `flash` layers, and `alibi`, which has linear biases whatever `pos_emb` says.

Multi-head or grouped-query, causal, with rotary positions (GPT-NeoX, Pythia, Llama), ALiBi (arXiv 2108.12409: train short, test
long) or none (the embedding adds learned ones). It is the baseline of every comparison and can be mixed with
linear layers in one `attention_config`. GPT-NeoX's flat keys reach a layer through `Config.neox_keys`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.layers.base import Context, Layer, LayerConfig, State
from megatron.ops.attention import Rule, alibi_slopes
from megatron.ops.attention.cache import Mixing, empty_cache, mix, mix_shard, mix_step_, steps_in_place
from megatron.ops.modules import row_linear
from megatron.ops.rotary import rotary_width


class SoftmaxAttention(Layer):
    """Causal attention over all earlier tokens, or over the last `window` of them.

    Biases of the input projections are added per head, that of the output once, after the reduction over ranks.
    """

    names: ClassVar[tuple[str, ...]] = ("global", "flash")
    context_parallel: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Config(LayerConfig):
        """Options of a softmax layer; those in `neox_keys` follow GPT-NeoX's keys unless they are set themselves."""

        neox_keys: ClassVar[Mapping[str, str]] = {
            "positions": "pos_emb",
            "kv_heads": "num_kv_heads",
            "window": "sliding_window_width",
            "rotary_fraction": "rotary_pct",
            "rotary_base": "rotary_emb_base",
            "bias": "use_bias_in_attn_linear",
            "qk_norm": "use_qk_layernorm",
            "dropout": "attention_dropout",
        }

        positions: str = "none"
        """rotary, alibi, none, or learned (added by the embedding, not by the layer)."""
        kv_heads: int | None = None
        """Heads of keys and values, a divisor of the query heads; unset: the query heads."""
        window: int | None = None
        """Previous tokens that a token sees in addition to itself; unset: all."""
        rotary_fraction: float = 1.0
        """Fraction of each head that is rotated."""
        rotary_base: float = 10000.0
        """Base of the rotary frequencies."""
        bias: bool = False
        """Biases of all four projections."""
        qk_norm: bool = False
        """A LayerNorm with gain over the width of each head of queries and keys, before the rotation."""
        dropout: float = 0.0
        """Dropout on attention weights in training."""
        bias_max: float = 8.0
        """ALiBi: the steepest slopes end at 2 to the minus this."""
        train_length: int | None = None
        """ALiBi: beyond this length slopes shrink by train_length / length (position interpolation); unset: never."""
        slope_factor: float = 1.0
        """ALiBi: all slopes are divided by this (position interpolation by a fixed factor)."""

        def resolved(self) -> LayerConfig:
            """Resolves the heads of keys and values; resets options of unused kinds of positions."""
            plain = replace(self, kv_heads=self.kv_heads or self.num_heads)
            if self.positions == "learned":  # the embedding adds them
                plain = replace(plain, positions="none")
            if self.positions != "rotary":
                plain = replace(plain, rotary_fraction=1.0, rotary_base=10000.0)
            if self.positions != "alibi":
                plain = replace(plain, bias_max=8.0, train_length=None, slope_factor=1.0)
            return plain

        def tp_divisor(self) -> int:
            """Heads, and with grouped queries groups of heads."""
            return math.gcd(self.num_heads, self.kv_heads or self.num_heads)

        def _reads_halo(self) -> bool:
            return self.window is not None and (self.positions != "alibi" or self.train_length is None)

        def cp_divisor(self) -> int:
            """Heads of keys and values, which all-to-all distributes; none with a window."""
            return 0 if self._reads_halo() else self.tp_divisor()

        def cp_halo(self) -> int:
            """Keys and values of the window."""
            return self.window or 0 if self._reads_halo() else 0

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        d, h = config.hidden_size, config.num_heads
        groups = config.kv_heads or h
        if d % h or h % groups:
            raise ValueError(f"attention needs hidden_size {d} divisible by {h} heads, and heads by kv_heads {groups}")
        if config.positions not in ("rotary", "alibi", "none", "learned"):
            raise ValueError(f"positions are rotary, alibi, learned or none, got {config.positions!r}")
        self.options, self.first_head = config, 0
        self.head_dim = d // h
        self.rotary = rotary_width(self.head_dim, config.rotary_fraction) if config.positions == "rotary" else 0
        self.q_proj = nn.Linear(d, d, bias=config.bias)
        self.k_proj = nn.Linear(d, groups * self.head_dim, bias=config.bias)
        self.v_proj = nn.Linear(d, groups * self.head_dim, bias=config.bias)
        self.out_proj = nn.Linear(d, d, bias=config.bias)
        self.q_norm = nn.Parameter(torch.ones(h, self.head_dim)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(groups, self.head_dim)) if config.qk_norm else None

    def set_shard(self, rank: int, size: int) -> None:
        """Slopes depend on the global head index."""
        self.first_head = rank * self.options.num_heads // size

    def slopes(self, device: torch.device | str) -> Tensor | None:
        """ALiBi's slopes [h] of the local heads, fp32; None without ALiBi."""
        if self.options.positions != "alibi":
            return None
        count = self.q_proj.out_features // self.head_dim
        local_slopes = alibi_slopes(self.options.num_heads, self.options.bias_max)[self.first_head : self.first_head + count]
        return torch.tensor([m / self.options.slope_factor for m in local_slopes], dtype=torch.float32, device=device)

    def _mixing(self, x: Tensor) -> Mixing:
        o = self.options
        slopes = self.slopes(x.device)
        if slopes is not None and x.dtype == torch.float64:
            slopes = slopes.double()
        rule = Rule(1 / math.sqrt(self.head_dim), o.window, slopes, o.dropout if self.training else 0.0)
        return Mixing(rule, self.rotary, o.rotary_base, o.train_length)

    def _heads(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [b, s, h, k], k and v [b, s, g, k] of u [b, s, d]."""
        return self._query(u), *self._key_value(u)

    def _query(self, u: Tensor) -> Tensor:
        return self._by_head(self.q_proj, u, self.q_norm)

    def _key_value(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return self._by_head(self.k_proj, u, self.k_norm), self._by_head(self.v_proj, u)

    def _by_head(self, projection: nn.Linear, u: Tensor, gain: Tensor | None = None) -> Tensor:
        """A projection by head, normalised where there is a gain."""
        x = projection(u).unflatten(-1, (-1, self.head_dim))
        return x if gain is None else F.layer_norm(x, (self.head_dim,)) * gain

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """`x [b, s, d]` -> `y [b, s, d]`; see `Layer.forward`."""
        u = self.copy_to_tp(x)
        if ctx.cp is not None:
            k, v = self._key_value(u)
            y = mix_shard(ctx.cp, lambda: self._query(u), k, v, self._mixing(x), ctx.backend)
        else:
            y, state = mix(*self._heads(u), self._mixing(x), state, ctx.mask, ctx.segment_ids, ctx.backend, ctx.attentions)
        return row_linear(self.out_proj, y.flatten(-2), self.reduce_from_tp), state

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """`x [b, d]` -> `y [b, d]`: one query over the cache; see `Layer.step`. In place a window is a ring."""
        mixing = self._mixing(x)
        if ctx.in_place and ctx.attentions is None and not mixing.rule.dropout and steps_in_place(mixing, state):
            y = mix_step_(*self._heads(self.copy_to_tp(x)), mixing, state, ctx.backend)
            return row_linear(self.out_proj, y.flatten(-2), self.reduce_from_tp), state
        y, after = self.forward(x.unsqueeze(1), Context(backend=ctx.backend, attentions=ctx.attentions), state)
        assert after is not None
        return y.squeeze(1), after

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> State:
        """An empty cache: see `ops/attention/cache.py`; of constant size with a window, growing without."""
        groups = self.k_proj.out_features // self.head_dim
        return empty_cache(batch, groups, self.head_dim, self.options.window, dtype, device)

    def draws_random(self) -> bool:
        """With dropout."""
        return self.options.dropout > 0

    def plan(self) -> Mapping[str, str]:
        """Sharded by head."""
        kinds = {"out_proj.weight": "row", "out_proj.bias": "replicated", "q_norm": "heads", "k_norm": "heads"}
        return {name: kinds.get(name, "column") for name, _ in self.named_parameters()}

    def init_rules(self) -> Mapping[str, str]:
        """As in GPT-NeoX: input and output matrices by their init methods, biases 0, gains 1."""
        rules = {"out_proj.weight": "output", "q_norm": "ones", "k_norm": "ones"}
        default = {name: "zeros" if name.endswith("bias") else "input" for name, _ in self.named_parameters()}
        return {name: rules.get(name, role) for name, role in default.items()}

    def no_decay(self) -> tuple[str, ...]:
        """The gains of the QK norm."""
        return () if self.q_norm is None else ("q_norm", "k_norm")

    def flops(self, seq_length: int) -> float:
        """Projections, and two products with the visible keys: half the sequence on average, or the window."""
        d, kv = self.options.hidden_size, (self.options.kv_heads or self.options.num_heads) * self.head_dim
        w = self.options.window
        visible = (seq_length + 1) / 2
        if w is not None and w + 1 < seq_length:
            visible = (w + 1) * (1 - w / (2 * seq_length))
        return 4.0 * d * d + 4.0 * d * kv + 4.0 * d * visible


class AlibiAttention(SoftmaxAttention):
    """Softmax attention with linear biases, whatever `pos_emb` says."""

    names: ClassVar[tuple[str, ...]] = ("alibi",)

    @dataclass(frozen=True)
    class Config(SoftmaxAttention.Config):
        """Options of an ALiBi layer."""

        neox_keys: ClassVar[Mapping[str, str]] = {
            "kv_heads": "num_kv_heads",
            "window": "sliding_window_width",
            "bias": "use_bias_in_attn_linear",
            "qk_norm": "use_qk_layernorm",
            "dropout": "attention_dropout",
        }

        no_options: ClassVar[tuple[str, ...]] = ("rotary_fraction", "rotary_base")

        positions: str = "alibi"
        """Always alibi."""
