"""JRT's prefix linear attention: Based with second keys and values of a prefix that every token sees (arXiv 2407.05483).

The prefix is read in both directions, everything after it causally; only these layers are bidirectional, convolutions and
windows of the model stay causal. A pass that starts from an empty state is a prefill and forms the prefix; later passes are
causal. `PrefixInputs` say how long the prefix of a pass is, else the option `prefix_length`; its default is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.layers.base import Context, Layer, LayerConfig, LayerInputs, State
from megatron.ops.opaque import values_visible
from megatron.ops.places import numbered
from megatron.ops.prefix import prefix_taylor
from megatron.ops.taylor import TAYLOR_CHUNK, empty_taylor_state, taylor_step
from megatron.ops.taylor_features import feature_count


@dataclass(frozen=True)
class PrefixInputs(LayerInputs):
    """What prefix layers read of a pass.

    Attributes:
        prefix_length: tokens at the start of a sequence that are read in both directions; None: as the layer's option says.
        prefix_mask: [b, s], 0 for filler in front of a prompt as JRT decodes it: prefix layers hide its keys, all others take
            it for text (`Context.mask` is what hides a token everywhere).
        prefix_per_document: whether the prefix is counted from the start of each document instead of the sequence; None: in
            an exported model, not in training.
    """

    prefix_length: int | None = None
    prefix_mask: Tensor | None = None
    prefix_per_document: bool | None = None

    def __post_init__(self) -> None:
        n = self.prefix_length
        if n is not None and (not isinstance(n, int) or n < 0):
            raise ValueError(f"prefix_length must be a number of tokens, got {n!r}")

    def of_pass(self, batch: int, seen: int, length: int) -> LayerInputs:
        """The mask counts in the pass that reads the prompt, and what follows the prompt is text."""
        given = self.prefix_mask
        each = True if self.prefix_per_document is None else self.prefix_per_document
        if given is None or seen:
            return replace(self, prefix_mask=None, prefix_per_document=each)
        if given.dim() != 2 or given.shape[0] != batch:
            raise ValueError(f"prefix_mask must be [{batch}, prompt] of 0 and 1, got {tuple(given.shape)}")
        if values_visible(given) and not bool(((given == 0) | (given == 1)).all()):
            raise ValueError("prefix_mask must hold 0 (filler) and 1 (text) only")
        if values_visible(given) and bool((given[:, length:] == 0).any()):
            raise ValueError("prefix_mask hides tokens behind this pass: the filler must be read in one piece")
        mask = F.pad(given, (0, max(0, length - given.shape[1])), value=1)[:, :length]
        return replace(self, prefix_mask=mask, prefix_per_document=each)


class PrefixBased(Layer):
    """Prefix linear attention. Value width per head is `hidden_size / heads`."""

    names: ClassVar[tuple[str, ...]] = ("jrt",)
    Inputs: ClassVar[type[LayerInputs] | None] = PrefixInputs

    @dataclass(frozen=True)
    class Config(LayerConfig):
        """Options of a JRT layer."""

        feature_width: int = 16
        """Width f of queries and keys per head."""
        heads: int = 0
        """Heads of the linear attention; 0 takes num_attention_heads."""
        prefix_length: int = 0
        """Tokens at the start of a sequence that all tokens see (the released models: 1024); shorter prompts are all prefix."""

        def resolved(self) -> LayerConfig:
            """The number of heads said."""
            return replace(self, heads=self.heads or self.num_heads)

        def tp_divisor(self) -> int:
            """The heads of the linear attention."""
            return self.heads or self.num_heads

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        d, heads = config.hidden_size, config.heads or config.num_heads
        if d % heads:
            raise ValueError(f"jrt needs hidden_size divisible by its heads, got {d} and {heads}")
        self.feature_width, self.value_dim, self.prefix_length = config.feature_width, d // heads, config.prefix_length
        narrow = heads * config.feature_width
        self.proj_q = nn.Linear(d, narrow, bias=False)
        self.proj_k = nn.Linear(d, narrow, bias=False)
        self.proj_v = nn.Linear(d, d, bias=False)
        self.proj_k_enc = nn.Linear(d, narrow, bias=False)
        self.proj_v_enc = nn.Linear(d, d, bias=False)
        self.out_proj = nn.Linear(d, d, bias=False)

    def _pair(self, x: Tensor, key: nn.Linear, value: nn.Linear) -> tuple[Tensor, Tensor]:
        """Keys [..., h, f] and values [..., h, v] of x [..., d]."""
        return key(x).unflatten(-1, (-1, self.feature_width)), value(x).unflatten(-1, (-1, self.value_dim))

    def _inside(self, ctx: Context, x: Tensor, state: State | None) -> Tensor:
        """[b, m]: 1 where a token of x [b, s, d] belongs to the prefix; real tokens are counted, padding is not.

        m is the prefix's length, or s where padding or documents let it lie anywhere.
        """
        b, s = x.shape[:2]
        length = self.two_way(ctx)
        own = ctx.segment_ids if ctx.read(PrefixInputs).prefix_per_document else None
        if (ctx.mask is None and own is None) or length == 0:
            inside = torch.ones(b, min(length, s), device=x.device)
        else:
            places, _ = numbered(b, s, ctx.mask, own, None, x.device)
            inside = (places < length).float()
            if ctx.mask is not None:
                inside = inside * ctx.mask.to(inside)
        return inside if state is None else inside * (state["tokens"][:, None] == 0)

    def two_way(self, ctx: Context) -> int:
        """The prefix: as the pass says, else as the option does."""
        given = ctx.read(PrefixInputs).prefix_length
        return self.prefix_length if given is None else given

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """`x [b, s, d]` -> `y [b, s, d]`; see `Layer.forward`. A state that has read nothing lets the pass form its prefix."""
        x = self.copy_to_tp(x)
        inside = self._inside(ctx, x, state)
        m = inside.shape[1]
        q = self.proj_q(x).unflatten(-1, (-1, self.feature_width))
        k, v = self._pair(x, self.proj_k, self.proj_v)
        k2, v2 = self._pair(x[:, :m], self.proj_k_enc, self.proj_v_enc)
        filler = ctx.read(PrefixInputs).prefix_mask
        if filler is not None:
            real = filler[..., None, None].to(k.dtype)
            k, k2 = k * real, k2 * real[:, :m]
        y, recurrent = prefix_taylor(
            q,
            k,
            v,
            k2,
            v2,
            inside,
            state=None if state is None else state["recurrent"],
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
        """`x [b, d]` -> `y [b, d]`; causal, the prefix stands in the state already. See `Layer.step`."""
        x = self.copy_to_tp(x)
        q = self.proj_q(x).unflatten(-1, (-1, self.feature_width))
        y, recurrent = taylor_step(q, *self._pair(x, self.proj_k, self.proj_v), state["recurrent"])
        return self.reduce_from_tp(self.out_proj(y.flatten(-2))), {"recurrent": recurrent, "tokens": state["tokens"] + 1}

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> State:
        """recurrent [b, h, e, v + 1] in fp32 (fp64 for an fp64 model), as `Based`; tokens [b] that it has read."""
        heads = self.proj_q.out_features // self.feature_width
        return {
            "recurrent": empty_taylor_state(batch, heads, self.feature_width, self.value_dim, dtype, device),
            "tokens": torch.zeros(batch, dtype=torch.long, device=device),
        }

    def plan(self) -> Mapping[str, str]:
        """By head."""
        return {name: "row" if name == "out_proj.weight" else "column" for name, _ in self.named_parameters()}

    def init_rules(self) -> Mapping[str, str]:
        """Every matrix normal, the output scaled by depth."""
        return {name: "output" if name == "out_proj.weight" else "input" for name, _ in self.named_parameters()}

    def flops(self, seq_length: int) -> float:
        """As `Based`; the second projections and features count for the prefix's share of the tokens."""
        d, f, c = self.config.hidden_size, self.feature_width, min(TAYLOR_CHUNK, seq_length)
        heads, wide = d // self.value_dim, self.value_dim + 1
        share = min(self.prefix_length, seq_length) / max(1, seq_length)
        causal = 2.0 * sum(p.numel() for name, p in self.named_parameters() if "_enc" not in name)
        scan = heads * (2.0 * c * (f + wide) + 4.0 * feature_count(f) * wide)
        prefix = 2.0 * (heads * f * d + d * d) + heads * 2.0 * feature_count(f) * wide
        return causal + scan + share * prefix
