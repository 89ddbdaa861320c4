"""MetaLA: linear attention with a dynamic decay as its only key (arXiv 2411.10741, NeurIPS 2024).

Query, decay gate, value and output gate share one short convolution of the input; there is no key projection (the key
is one minus the decay) and no positional encoding: decay and convolution encode the order. Keys and queries are
half as wide as the model. Parameter names are those of the released checkpoints.

Differences from the released code, none of which affects the weights: the key is computed in fp32 without cancellation
(`gate_round` restores the original rounding), each tensor-parallel rank runs its own heads only, padding does not
change the state, a pass of several tokens continues from the convolution's history too, and document masking is supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from megatron.layers.base import Context, Layer, LayerConfig, State
from megatron.ops.conv import conv_step_, next_history
from megatron.ops.metala import MetaLAProjections, metala_projected, metala_step, metala_step_
from megatron.ops.modules import ShortConv
from megatron.ops.packed_linear import pack_weights
from megatron.ops.precision import sum_dtype


class MetaLA(Layer):
    """The MetaLA token mixer. Key width per head is `hidden_size / (2 num_heads)`, value width twice that."""

    names: ClassVar[tuple[str, ...]] = ("metala",)
    steps_by_slot: ClassVar[bool] = True
    context_parallel: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Config(LayerConfig):
        """Options of a MetaLA layer."""

        conv_width: int = 4
        """Kernel size of the short causal convolution before the projections."""
        gate_round: str = "none"
        """none | bf16 | fp16: round gate and key as the released half-precision code does, to score its checkpoints."""

        def cp_halo(self) -> int:
            """The convolution's history."""
            return self.conv_width - 1

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

    def _projections(self) -> MetaLAProjections:
        return MetaLAProjections(self.q_proj, self.k_gate, self.v_proj, self.g_proj)

    def _balance(self) -> Tensor:
        """The augmentation vector by head, [h, k]; h is that of this tensor-parallel rank."""
        return self.aug_balance.view(-1, self.key_dim)

    def pack_weights(self) -> None:
        """Put the four projections one behind the other in memory: the fused path then reads them as one without a copy."""
        pack_weights(self._projections().weights)

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """`x [b, s, d]` -> `y [b, s, d]`; see `Layer.forward`."""
        if ctx.mask is not None:
            x = x * ctx.mask[..., None].to(x.dtype)
        history = ctx.history(x, self.width - 1, state, "conv")
        u = self.conv1d(x, history, ctx.segment_ids, ctx.backend)
        y, recurrent = metala_projected(
            self.copy_to_tp(u),
            self._projections(),
            self._balance(),
            start=lambda summary: ctx.start_async(state, "recurrent", summary),
            sharded=ctx.cp is not None,
            mask=ctx.mask,
            segment_ids=ctx.segment_ids,
            gate_round=self.gate_round,
            backend=ctx.backend,
        )
        y = self.reduce_from_tp(self.out_proj(y.flatten(-2)))
        if state is None:
            return y, None
        return y, {"recurrent": recurrent, "conv": next_history(x, history, self.width, ctx.mask, ctx.segment_ids)}

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """`x [b, d]` -> `y [b, d]` with one state update; see `Layer.step`."""
        w = self._balance()
        if ctx.in_place:
            u = self.copy_to_tp(conv_step_(x, self.conv1d.weight, state["conv"], slots=ctx.slots, backend=ctx.backend))
            parts = self._projections().by_head_at_once(u, w, ctx.backend)
            y = metala_step_(*parts, w, state["recurrent"], slots=ctx.slots, gate_round=self.gate_round, backend=ctx.backend)
            return self.reduce_from_tp(self.out_proj(y.flatten(-2))), state
        x, history = x.unsqueeze(1), state["conv"]
        u = self.conv1d(x, history, backend=ctx.backend).squeeze(1)
        parts = self._projections().by_head(self.copy_to_tp(u), w)
        y, recurrent = metala_step(*parts, w, state["recurrent"], self.gate_round)
        y = self.reduce_from_tp(self.out_proj(y.flatten(-2)))
        return y, {"recurrent": recurrent, "conv": next_history(x, history, self.width)}

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> State:
        """recurrent [b, h, k, v] in fp32 (fp64 for an fp64 model), conv [b, width - 1, d] in the model's dtype."""
        heads = self.aug_balance.numel() // self.key_dim
        return {
            "recurrent": torch.zeros(batch, heads, self.key_dim, self.value_dim, dtype=sum_dtype(dtype), device=device),
            "conv": torch.zeros(batch, self.width - 1, self.conv1d.out_channels, dtype=dtype, device=device),
        }

    def plan(self) -> Mapping[str, str]:
        """Sharded by head; the convolution is replicated because it runs before `copy_to_tp`."""
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
        """As in the released NeoX code: conv keeps PyTorch's uniform +-1/sqrt(width), augmentation starts as a no-op."""
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
        """The augmentation vector is a gain that starts at zero, so decay would only pull it back."""
        return ("aug_balance",)

    def flops(self, seq_length: int) -> float:
        """Projections 8 d^2, convolution 2 w d, and per head the chunked scan: two products in a chunk, two across."""
        d, h, c = self.config.hidden_size, self.config.num_heads, min(64, seq_length)
        scan = 2 * c * (self.key_dim + self.value_dim) + 4 * self.key_dim * self.value_dim
        return 8.0 * d * d + 2.0 * self.width * d + h * scan
