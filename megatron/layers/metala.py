"""MetaLA: linear attention with a dynamic decay as its only key (arXiv 2411.10741, NeurIPS 2024).

Query, decay gate, value and output gate all read the same short convolution of the input; there is no key projection (the key
is one minus the decay) and no positional encoding of any kind: order comes from decay and convolution. Keys and queries are
half as wide as the model. Parameter names are those of the released checkpoints.

Differences from the released code, none of which touches the weights: the key is formed in fp32 without cancellation
(`gate_round` restores the old rounding), each tensor-parallel rank runs its own heads only, padding on either side leaves the
state alone, a pass of several tokens continues from the convolution's history as well, and documents can be kept apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from megatron.layers.base import Context, Layer, LayerConfig, State
from megatron.ops.conv import conv_step_, next_history
from megatron.ops.dispatch import chosen
from megatron.ops.metala import metala, metala_step, metala_step_
from megatron.ops.metala_packed import metala_packed
from megatron.ops.modules import ShortConv, are_plain
from megatron.ops.packed import cut_packed, pack_weights, packed_linear


class MetaLA(Layer):
    """The MetaLA token mixer. Key width per head is `hidden_size / (2 num_heads)`, value width twice that."""

    names: ClassVar[tuple[str, ...]] = ("metala",)

    @dataclass(frozen=True)
    class Config(LayerConfig):
        """Options of a MetaLA layer."""

        conv_width: int = 4
        """Taps of the short causal convolution in front of the projections."""
        gate_round: str = "none"
        """none | bf16 | fp16: round gate and key as the released half-precision code does, to score its checkpoints."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        d, h = config.hidden_size, config.num_heads
        if d % (2 * h):
            raise ValueError(f"metala needs hidden_size divisible by 2 * num_attention_heads, got {d} and {h}")
        if config.gate_round not in ("none", "bf16", "fp16"):
            raise ValueError(f"metala_gate_round is none, bf16 or fp16, got {config.gate_round!r}")
        self.key_dim, self.value_dim = d // (2 * h), d // h
        self.width, self.gate_round = config.conv_width, config.gate_round
        self.conv1d = ShortConv(d, config.conv_width)
        self.q_proj = nn.Linear(d, d // 2, bias=False)
        self.k_gate = nn.Linear(d, d // 2, bias=False)
        self.v_proj = nn.Linear(d, d, bias=False)
        self.g_proj = nn.Linear(d, d, bias=True)
        self.out_proj = nn.Linear(d, d, bias=False)
        self.aug_balance = nn.Parameter(torch.zeros(d // 2))

    def _heads(self, u: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Projections of u [..., d] cut into heads: q, z [..., h, k]; v, g [..., h, v]; w [h, k]; h from the shapes."""
        v = self.v_proj(u)
        if mask is not None:
            v = v * mask[..., None].to(v.dtype)
        k, wide = (-1, self.key_dim), (-1, self.value_dim)
        return (
            self.q_proj(u).unflatten(-1, k),
            self.k_gate(u).unflatten(-1, k),
            v.unflatten(-1, wide),
            self.g_proj(u).unflatten(-1, wide),
            self.aug_balance.view(k),
        )

    def _packed(self, u: Tensor, backend: str) -> Tensor:
        """All projections of u [..., d] by one product: q | z | v | g."""
        return packed_linear(u, self._projections(), self.g_proj.bias, backend)

    def _projections(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.q_proj.weight, self.k_gate.weight, self.v_proj.weight, self.g_proj.weight

    def pack_weights(self) -> None:
        """Put the four projections one behind the other in memory: the fused path then reads them as one without a copy."""
        pack_weights(self._projections())

    def _mix(self, u: Tensor, ctx: Context, recurrent: Tensor | None) -> tuple[Tensor, Tensor]:
        """The operator on the projections of `u [b, s, d]`: y [b, s, h, v] and the last state.

        They are one product, whose gradient comes back in one piece. The paths that are to be an independent check have four,
        and so have projections that are more than plain matrices (adapters, quantised weights, hooks).
        """
        plain = are_plain(self.q_proj, self.k_gate, self.v_proj, self.g_proj)
        if plain and chosen("metala", ctx.backend, u.device) in ("triton", "torch"):
            return metala_packed(
                self._packed(u, ctx.backend),
                self.aug_balance.view(-1, self.key_dim),
                state=recurrent,
                mask=ctx.mask,
                segment_ids=ctx.segment_ids,
                gate_round=self.gate_round,
                backend=ctx.backend,
            )
        return metala(
            *self._heads(u, ctx.mask),
            state=recurrent,
            mask=ctx.mask,
            segment_ids=ctx.segment_ids,
            gate_round=self.gate_round,
            backend=ctx.backend,
        )

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """`x [b, s, d]` -> `y [b, s, d]`; see `Layer.forward`."""
        if ctx.mask is not None:
            x = x * ctx.mask[..., None].to(x.dtype)
        history = None if state is None else state["conv"]
        u = self.conv1d(x, history, ctx.segment_ids, ctx.backend)
        y, recurrent = self._mix(self.copy_to_tp(u), ctx, None if state is None else state["recurrent"])
        y = self.reduce_from_tp(self.out_proj(y.flatten(-2)))
        if state is None:
            return y, None
        return y, {"recurrent": recurrent, "conv": next_history(x, history, self.width, ctx.mask, ctx.segment_ids)}

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """`x [b, d]` -> `y [b, d]` with one state update; see `Layer.step`."""
        if ctx.in_place:
            u = self.copy_to_tp(conv_step_(x, self.conv1d.weight, state["conv"], backend=ctx.backend))
            w = self.aug_balance.view(-1, self.key_dim)
            parts = cut_packed(self._packed(u, ctx.backend), w)
            y = metala_step_(*parts, w, state["recurrent"], gate_round=self.gate_round, backend=ctx.backend)
            return self.reduce_from_tp(self.out_proj(y.flatten(-2))), state
        x, history = x.unsqueeze(1), state["conv"]
        u = self.conv1d(x, history, backend=ctx.backend).squeeze(1)
        y, recurrent = metala_step(*self._heads(self.copy_to_tp(u), None), state["recurrent"], self.gate_round)
        y = self.reduce_from_tp(self.out_proj(y.flatten(-2)))
        return y, {"recurrent": recurrent, "conv": next_history(x, history, self.width)}

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> State:
        """recurrent [b, h, k, v] in fp32 (fp64 for an fp64 model), conv [b, width - 1, d] in the model's dtype."""
        heads = self.aug_balance.numel() // self.key_dim
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return {
            "recurrent": torch.zeros(batch, heads, self.key_dim, self.value_dim, dtype=wide, device=device),
            "conv": torch.zeros(batch, self.width - 1, self.conv1d.out_channels, dtype=dtype, device=device),
        }

    def plan(self) -> Mapping[str, str]:
        """By head; the convolution stays whole because it runs before the split."""
        return {
            "conv1d.weight": "replicated",
            "q_proj.weight": "column",
            "k_gate.weight": "column",
            "v_proj.weight": "column",
            "g_proj.weight": "column",
            "g_proj.bias": "column",
            "aug_balance": "heads",
            "out_proj.weight": "row",
        }

    def init_rules(self) -> Mapping[str, str]:
        """The released NeoX file's choices: conv keeps PyTorch's uniform +-1/sqrt(width), augmentation starts as a no-op."""
        return {
            "conv1d.weight": "conv",
            "q_proj.weight": "input",
            "k_gate.weight": "input",
            "v_proj.weight": "input",
            "g_proj.weight": "input",
            "g_proj.bias": "zeros",
            "aug_balance": "zeros",
            "out_proj.weight": "output",
        }

    def no_decay(self) -> tuple[str, ...]:
        """The augmentation vector starts at zero and is a gain, not a map: decay would only pull it back."""
        return ("aug_balance",)

    def flops(self, seq_length: int) -> float:
        """Projections 8 d^2, convolution 2 w d, and per head the chunked scan: two products inside a chunk, two across."""
        d, h, c = self.config.hidden_size, self.config.num_heads, min(64, seq_length)
        scan = 2 * c * (self.key_dim + self.value_dim) + 4 * self.key_dim * self.value_dim
        return 8.0 * d * d + 2.0 * self.width * d + h * scan
