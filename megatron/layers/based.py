"""Based's linear attention: the second-order Taylor polynomial of softmax attention (arXiv 2402.18668).

Queries and keys are projected to width `feature_width` per head, values keep the head's width; no rotary, no norm, no
gate. `ops/taylor/` has the formulas. The optional decay is that of the released `based-360M-30B`: numerators decay by a fixed
rate 1 - 2^(decay_const - head) per head and are multiplied by a linear gate of the input; denominators are not.

Differences from the released code, none of which affects the weights: denominators and states are always in fp32, the feature
map is packed (153 instead of 273 features at width 16), generation is correct in every form (three of the original's build a
wrong state), and padding and document boundaries are supported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from megatron.layers.base import Context, Layer, LayerConfig, State
from megatron.ops.summary.taylor import taylor_summary
from megatron.ops.taylor import TAYLOR_CHUNK, empty_taylor_state, taylor, taylor_step, taylor_step_
from megatron.ops.taylor.features import feature_count


class Based(Layer):
    """Taylor linear attention. Value width per head is `hidden_size / heads`."""

    names: ClassVar[tuple[str, ...]] = ("based",)
    steps_by_slot: ClassVar[bool] = True
    context_parallel: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Config(LayerConfig):
        """Options of a Based layer."""

        feature_width: int = 16
        """Width f of queries and keys per head; the state has 1 + f + f (f + 1) / 2 rows per head."""
        heads: int = 0
        """Heads of the linear attention; 0 takes num_attention_heads."""
        decay: bool = False
        """Fixed decay of the numerators with a gate of the input (the released based-360M-30B)."""
        decay_const: float = -3.0
        """c of the decay rate 1 - 2^(c - head)."""

        def resolved(self) -> LayerConfig:
            """Resolves the number of heads; without decay resets its constant."""
            constant = self.decay_const if self.decay else -3.0
            return replace(self, heads=self.heads or self.num_heads, decay_const=constant)

        def tp_divisor(self) -> int:
            """The number of heads of the linear attention."""
            return self.heads or self.num_heads

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        d, heads = config.hidden_size, config.heads or config.num_heads
        if d % heads:
            raise ValueError(f"based needs hidden_size divisible by its heads, got {d} and {heads}")
        self.feature_width, self.value_dim = config.feature_width, d // heads
        self.heads, self.decay_const, self.first_head = heads, config.decay_const, 0
        self.proj_q = nn.Linear(d, heads * config.feature_width, bias=False)
        self.proj_k = nn.Linear(d, heads * config.feature_width, bias=False)
        self.proj_v = nn.Linear(d, d, bias=False)
        self.decay_proj = nn.Linear(d, heads, bias=False) if config.decay else None
        self.out_proj = nn.Linear(d, d, bias=False)

    def _query(self, x: Tensor) -> Tensor:
        """q [..., h, f] of x [..., d]."""
        return self.proj_q(x).unflatten(-1, (-1, self.feature_width))

    def _key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """k [..., h, f] and v [..., h, v] of x [..., d]."""
        v = self.proj_v(x).unflatten(-1, (-1, self.value_dim))
        return self.proj_k(x).unflatten(-1, (-1, self.feature_width)), v

    def set_shard(self, rank: int, size: int) -> None:
        """Decay rates depend on the global head index."""
        self.first_head = rank * self.heads // size

    def log_decay(self, device: torch.device) -> Tensor | None:
        """log(1 - 2^(c - head)) of the local heads `[h]`, rounded to fp32 like the released buffer; None without decay."""
        if self.decay_proj is None:
            return None
        count = self.decay_proj.out_features
        head = torch.arange(self.first_head, self.first_head + count, device=device, dtype=torch.float64)
        return torch.log1p(-torch.exp2(self.decay_const - head)).float()

    def _finish(self, y: Tensor, x: Tensor) -> Tensor:
        if self.decay_proj is not None:
            y = y * self.decay_proj(x).unsqueeze(-1)
        return self.reduce_from_tp(self.out_proj(y.flatten(-2)))

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """`x [b, s, d]` -> `y [b, s, d]`; see `Layer.forward`."""
        x = self.copy_to_tp(x)
        log_decay = self.log_decay(x.device)
        if log_decay is not None:  # a padded token neither writes nor decays
            present = torch.ones(1, x.shape[1], device=x.device) if ctx.mask is None else ctx.mask
            log_decay = present[..., None] * log_decay
        k, v = self._key_value(x)
        start = ctx.start_async(
            state, "recurrent", lambda: taylor_summary(k, v, ctx.segment_ids, log_decay, backend=ctx.backend)
        )
        y, recurrent = taylor(
            self._query(x),
            k,
            v,
            state=start(),
            keep=ctx.mask,
            log_decay=log_decay,
            segment_ids=ctx.segment_ids,
            backend=ctx.backend,
        )
        return self._finish(y, x), None if state is None else {"recurrent": recurrent}

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """`x [b, d]` -> `y [b, d]` with one state update; see `Layer.step`."""
        x = self.copy_to_tp(x)
        log_decay = self.log_decay(x.device)
        q, (k, v) = self._query(x), self._key_value(x)
        if ctx.in_place:
            y = taylor_step_(q, k, v, state["recurrent"], log_decay, slots=ctx.slots, backend=ctx.backend)
            return self._finish(y, x), state
        y, recurrent = taylor_step(q, k, v, state["recurrent"], log_decay)
        return self._finish(y, x), {"recurrent": recurrent}

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> State:
        """recurrent [b, h, e, v + 1] in fp32 (fp64 for an fp64 model); the last column is the denominator."""
        heads = self.proj_q.out_features // self.feature_width
        return {"recurrent": empty_taylor_state(batch, heads, self.feature_width, self.value_dim, dtype, device)}

    def plan(self) -> Mapping[str, str]:
        """Sharded by head."""
        return {name: "row" if name == "out_proj.weight" else "column" for name, _ in self.named_parameters()}

    def init_rules(self) -> Mapping[str, str]:
        """Normal matrices, the output scaled by depth."""
        return {name: "output" if name == "out_proj.weight" else "input" for name, _ in self.named_parameters()}

    def flops(self, seq_length: int) -> float:
        """Projections, and per head the chunked form: all pairs inside a chunk, features times state across."""
        d, f, c = self.config.hidden_size, self.feature_width, min(TAYLOR_CHUNK, seq_length)
        heads, columns = d // self.value_dim, self.value_dim + 1
        matrices = sum(math.prod(p.shape) for name, p in self.named_parameters() if name.endswith("weight"))
        return 2.0 * matrices + heads * (2.0 * c * (f + columns) + 4.0 * feature_count(f) * columns)
