"""JRT's prefix linear attention: Based with additional keys and values of a prefix that every token sees (arXiv 2407.05483).

The prefix is read in both directions, all later tokens causally; only these layers are bidirectional, convolutions and
windows of the model are causal. A pass that starts from an empty state is a prefill and forms the prefix; later passes are
causal. `PrefixInputs` set the prefix length of a pass, by default the option `prefix_length`, which defaults to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.layers.base import Context, Layer, LayerConfig, LayerInputs, State
from megatron.ops.opaque import values_visible
from megatron.ops.places import document_offset, numbered
from megatron.ops.summary.taylor import taylor_summary
from megatron.ops.taylor import TAYLOR_CHUNK, empty_taylor_state, taylor_step, taylor_step_
from megatron.ops.taylor.features import feature_count
from megatron.ops.taylor.prefix import prefix_taylor


@dataclass(frozen=True)
class PrefixInputs(LayerInputs):
    """Inputs of prefix layers.

    Attributes:
        prefix_length: number of leading tokens that are read in both directions; None: the layer's option.
        prefix_mask: [b, s], 0 for fill tokens before a prompt, as in JRT's decoding: prefix layers mask their keys, all other
            layers treat them as text (`Context.mask` masks a token everywhere).
        prefix_per_document: the prefix starts at each document instead of the sequence; None: True in an exported model,
            False in training.
    """

    prefix_length: int | None = None
    prefix_mask: Tensor | None = None
    prefix_per_document: bool | None = None

    def __post_init__(self) -> None:
        n = self.prefix_length
        if n is not None and (not isinstance(n, int) or n < 0):
            raise ValueError(f"prefix_length must be a number of tokens, got {n!r}")

    def of_pass(self, batch: int, seen: int, length: int) -> LayerInputs:
        """The mask applies to the pass that reads the prompt; tokens after the prompt are text."""
        mask = self.prefix_mask
        per_document = True if self.prefix_per_document is None else self.prefix_per_document
        if mask is None or seen:
            return replace(self, prefix_mask=None, prefix_per_document=per_document)
        if mask.dim() != 2 or mask.shape[0] != batch:
            raise ValueError(f"prefix_mask must be [{batch}, prompt] of 0 and 1, got {tuple(mask.shape)}")
        if values_visible(mask) and not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("prefix_mask must hold 0 (filler) and 1 (text) only")
        if values_visible(mask) and bool((mask[:, length:] == 0).any()):
            raise ValueError("prefix_mask masks tokens after this pass: a single pass must read all fill tokens")
        padded_mask = F.pad(mask, (0, max(0, length - mask.shape[1])), value=1)[:, :length]
        return replace(self, prefix_mask=padded_mask, prefix_per_document=per_document)


class PrefixBased(Layer):
    """Prefix linear attention. Value width per head is `hidden_size / heads`."""

    names: ClassVar[tuple[str, ...]] = ("jrt",)
    steps_by_slot: ClassVar[bool] = True
    context_parallel: ClassVar[bool] = True
    Inputs: ClassVar[type[LayerInputs] | None] = PrefixInputs

    @dataclass(frozen=True)
    class Config(LayerConfig):
        """Options of a JRT layer."""

        feature_width: int = 16
        """Width f of queries and keys per head."""
        heads: int = 0
        """Heads of the linear attention; 0 takes num_attention_heads."""
        prefix_length: int = 0
        """Leading tokens that all tokens see (released models: 1024); a shorter prompt is all prefix."""

        def resolved(self) -> LayerConfig:
            """Resolves the number of heads."""
            return replace(self, heads=self.heads or self.num_heads)

        def tp_divisor(self) -> int:
            """The number of heads of the linear attention."""
            return self.heads or self.num_heads

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        d, heads = config.hidden_size, config.heads or config.num_heads
        if d % heads:
            raise ValueError(f"jrt needs hidden_size divisible by its heads, got {d} and {heads}")
        self.feature_width, self.value_dim, self.prefix_length = config.feature_width, d // heads, config.prefix_length
        qk_width = heads * config.feature_width
        self.proj_q = nn.Linear(d, qk_width, bias=False)
        self.proj_k = nn.Linear(d, qk_width, bias=False)
        self.proj_v = nn.Linear(d, d, bias=False)
        self.proj_k_enc = nn.Linear(d, qk_width, bias=False)
        self.proj_v_enc = nn.Linear(d, d, bias=False)
        self.out_proj = nn.Linear(d, d, bias=False)

    def _query(self, x: Tensor) -> Tensor:
        """Queries [..., h, f] of x [..., d]."""
        return self.proj_q(x).unflatten(-1, (-1, self.feature_width))

    def _pair(self, x: Tensor, key: nn.Linear, value: nn.Linear) -> tuple[Tensor, Tensor]:
        """Keys [..., h, f] and values [..., h, v] of x [..., d]."""
        return key(x).unflatten(-1, (-1, self.feature_width)), value(x).unflatten(-1, (-1, self.value_dim))

    def _inside(self, ctx: Context, x: Tensor, state: State | None) -> Tensor:
        """[b, m]: 1 where a token of x [b, s, d] belongs to the prefix, counting tokens without padding.

        m is the prefix length, or s if padding or documents allow a prefix at any position. A context-parallel shard behind the
        prefix has m = 1, so that all ranks take part in the exchange.
        """
        b, s = x.shape[:2]
        length = self.two_way(ctx)
        document_ids = ctx.segment_ids if ctx.read(PrefixInputs).prefix_per_document else None
        if (ctx.mask is None and document_ids is None) or length == 0:
            offset = 0 if ctx.cp is None else ctx.cp.offset
            m = min(s, max(length - offset, min(length, 1)))
            inside = torch.full((b, m), float(offset < length), device=x.device)
        else:
            seen = None if ctx.cp is None else document_offset(ctx.cp, b, x.device)
            positions, _ = numbered(b, s, ctx.mask, document_ids, seen, x.device)
            inside = (positions < length).float()
            if ctx.mask is not None:
                inside = inside * ctx.mask.to(inside)
        return inside if state is None else inside * (state["tokens"][:, None] == 0)

    def _start_async(
        self, ctx: Context, causal: tuple[Tensor, Tensor], prefix: tuple[Tensor, Tensor], inside: Tensor
    ) -> Callable[[], tuple[Tensor | None, Tensor | None]]:
        """Waits for what other context-parallel shards hold: causal and prefix state to the left, prefix state to the right.

        Args:
            ctx: the context of the pass.
            causal: keys and values, [b, s, h, .].
            prefix: those of the prefix, [b, m, h, .].
            inside: [b, m], see `_inside`.
        """
        cp = ctx.cp
        if cp is None:
            return lambda: (None, None)
        if not inside.shape[1]:
            start = cp.carry_async(taylor_summary(*causal, ctx.segment_ids, backend=ctx.backend)[0])
            return lambda: (start(), None)
        last = first = inside
        if ctx.segment_ids is not None:
            ids = ctx.segment_ids[:, : inside.shape[1]]
            last, first = (inside * (ids == ctx.segment_ids[:, at]) for at in (slice(-1, None), slice(0, 1)))
        in_last, _ = taylor_summary(*prefix, keep=last, backend=ctx.backend)
        in_first = in_last if ctx.segment_ids is None else taylor_summary(*prefix, keep=first, backend=ctx.backend)[0]
        behind = cp.carry_async(in_first, reverse=True)  # the shorter summary first: the other is computed meanwhile
        left, _ = taylor_summary(*causal, ctx.segment_ids, backend=ctx.backend)
        before = cp.carry_async(left + in_last)
        return lambda: (before(), behind())

    def two_way(self, ctx: Context) -> int:
        """The prefix length of the pass, else of the option."""
        length = ctx.read(PrefixInputs).prefix_length
        return self.prefix_length if length is None else length

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """`x [b, s, d]` -> `y [b, s, d]`; see `Layer.forward`. A pass from an empty state forms the prefix."""
        x = self.copy_to_tp(x)
        inside = self._inside(ctx, x, state)
        m = inside.shape[1]
        q = None if ctx.cp is not None else self._query(x)  # without shards first, as gradients are summed in this order
        k, v = self._pair(x, self.proj_k, self.proj_v)
        k2, v2 = self._pair(x[:, :m], self.proj_k_enc, self.proj_v_enc)
        prefix_mask = ctx.read(PrefixInputs).prefix_mask
        if prefix_mask is not None:
            visible = prefix_mask[..., None, None].to(k.dtype)
            k, k2 = k * visible, k2 * visible[:, :m]
        wait = self._start_async(ctx, (k, v), (k2, v2), inside)
        q = self._query(x) if q is None else q  # overlaps with the exchange
        start, behind = wait()
        y, recurrent = prefix_taylor(
            q,
            k,
            v,
            k2,
            v2,
            inside,
            state=start if state is None else state["recurrent"],
            behind=behind,
            keep=ctx.mask,
            segment_ids=ctx.segment_ids,
            backend=ctx.backend,
        )
        y = self.reduce_from_tp(self.out_proj(y.flatten(-2)))
        if state is None:
            return y, None
        _, tokens = numbered(x.shape[0], x.shape[1], ctx.mask, ctx.segment_ids, state["tokens"], x.device)
        return y, {"recurrent": recurrent, "tokens": tokens}

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """`x [b, d]` -> `y [b, d]`; causal, as the state already contains the prefix. See `Layer.step`."""
        x = self.copy_to_tp(x)
        q = self._query(x)
        k, v = self._pair(x, self.proj_k, self.proj_v)
        if ctx.in_place:
            y = taylor_step_(q, k, v, state["recurrent"], slots=ctx.slots, backend=ctx.backend)
            state["tokens"][slice(None) if ctx.slots is None else ctx.slots] += 1
            return self.reduce_from_tp(self.out_proj(y.flatten(-2))), state
        y, recurrent = taylor_step(q, k, v, state["recurrent"])
        return self.reduce_from_tp(self.out_proj(y.flatten(-2))), {"recurrent": recurrent, "tokens": state["tokens"] + 1}

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> State:
        """recurrent [b, h, e, v + 1] in fp32 (fp64 for an fp64 model), as in `Based`; tokens [b] read so far."""
        heads = self.proj_q.out_features // self.feature_width
        return {
            "recurrent": empty_taylor_state(batch, heads, self.feature_width, self.value_dim, dtype, device),
            "tokens": torch.zeros(batch, dtype=torch.long, device=device),
        }

    def plan(self) -> Mapping[str, str]:
        """Sharded by head."""
        return {name: "row" if name == "out_proj.weight" else "column" for name, _ in self.named_parameters()}

    def init_rules(self) -> Mapping[str, str]:
        """Normal matrices, the output scaled by depth."""
        return {name: "output" if name == "out_proj.weight" else "input" for name, _ in self.named_parameters()}

    def flops(self, seq_length: int) -> float:
        """As in `Based`; the prefix's projections and features count for its fraction of the tokens."""
        d, f, c = self.config.hidden_size, self.feature_width, min(TAYLOR_CHUNK, seq_length)
        heads, columns = d // self.value_dim, self.value_dim + 1
        prefix_fraction = min(self.prefix_length, seq_length) / max(1, seq_length)
        causal = 2.0 * sum(p.numel() for name, p in self.named_parameters() if "_enc" not in name)
        scan = heads * (2.0 * c * (f + columns) + 4.0 * feature_count(f) * columns)
        prefix = 2.0 * (heads * f * d + d * d) + heads * 2.0 * feature_count(f) * columns
        return causal + scan + prefix_fraction * prefix
