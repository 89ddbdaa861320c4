"""BaseConv: the gated short convolution that makes up most layers of Based and JRT (arXiv 2402.18668, section 4).

    y = W_out( silu(conv(W_conv x + b_conv)) * (W_gate x + b_gate) ) + b_out

with a depthwise causal convolution of kernel size 3 over `expand * d` channels. The released code has one projection of twice
that width; here its halves are two parameters, so that tensor parallelism shards each by channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from megatron.layers.base import Context, Layer, LayerConfig, State
from megatron.ops.conv import conv_step_, next_history
from megatron.ops.modules import ShortConv, row_linear


class BaseConv(Layer):
    """The gated convolution mixer; its state is the last inputs of the convolution."""

    names: ClassVar[tuple[str, ...]] = ("base_conv",)
    uses_heads: ClassVar[bool] = False
    steps_by_slot: ClassVar[bool] = True
    context_parallel: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Config(LayerConfig):
        """Options of a BaseConv layer."""

        conv_width: int = 3
        """Kernel size of the causal convolution."""
        expand: int = 2
        """Channels of the convolution per channel of the model."""
        bias: bool = True
        """Biases of the projections; the convolution has none."""

        def tp_divisor(self) -> int:
            """The channels of the convolution."""
            return self.expand * self.hidden_size

        def cp_halo(self) -> int:
            """The convolution's history."""
            return self.conv_width - 1

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        d, inner = config.hidden_size, config.expand * config.hidden_size
        self.width, self.expand = config.conv_width, config.expand
        self.conv_proj = nn.Linear(d, inner, bias=config.bias)
        self.gate_proj = nn.Linear(d, inner, bias=config.bias)
        self.conv1d = ShortConv(inner, config.conv_width)
        self.out_proj = nn.Linear(inner, d, bias=config.bias)

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """`x [b, s, d]` -> `y [b, s, d]`; see `Layer.forward`."""
        x = self.copy_to_tp(x)
        a = self.conv_proj(x)
        if ctx.mask is not None:
            a = a * ctx.mask[..., None].to(a.dtype)
        wait = ctx.history_async(a, self.width - 1, state, "conv")
        gate = self.gate_proj(x)
        history = wait()
        c = self.conv1d(a, history, ctx.segment_ids, ctx.backend)
        y = row_linear(self.out_proj, c * gate, self.reduce_from_tp)
        return y, None if state is None else {"conv": next_history(a, history, self.width, ctx.mask, ctx.segment_ids)}

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """`x [b, d]` -> `y [b, d]`; see `Layer.step`."""
        x = self.copy_to_tp(x)
        if ctx.in_place:
            weight, gate = self.conv1d.weight, self.gate_proj(x)
            y = conv_step_(self.conv_proj(x), weight, state["conv"], gate=gate, slots=ctx.slots, backend=ctx.backend)
            return row_linear(self.out_proj, y, self.reduce_from_tp), state
        a, history = self.conv_proj(x).unsqueeze(1), state["conv"]
        c = self.conv1d(a, history, backend=ctx.backend).squeeze(1)
        y = row_linear(self.out_proj, c * self.gate_proj(x), self.reduce_from_tp)
        return y, {"conv": next_history(a, history, self.width)}

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> State:
        """conv [b, width - 1, expand * d] in the model's dtype."""
        return {"conv": torch.zeros(batch, self.width - 1, self.conv1d.out_channels, dtype=dtype, device=device)}

    def plan(self) -> Mapping[str, str]:
        """Sharded by channel of the convolution."""
        kinds = {"conv1d.weight": "heads", "out_proj.weight": "row", "out_proj.bias": "replicated"}
        return {name: kinds.get(name, "column") for name, _ in self.named_parameters()}

    def init_rules(self) -> Mapping[str, str]:
        """Every matrix normal, the output scaled by depth, the convolution PyTorch's uniform +-1/sqrt(width)."""
        roles = {"conv1d.weight": "conv", "out_proj.weight": "output"}
        return {n: roles.get(n, "zeros" if n.endswith("bias") else "input") for n, _ in self.named_parameters()}

    def flops(self, seq_length: int) -> float:
        """Three projections of `expand * d`, and the convolution."""
        d = self.config.hidden_size
        return 6.0 * self.expand * d * d + 2.0 * self.width * self.expand * d
