"""Mamba-1: a gated selective state space layer (arXiv 2312.00752), the recurrent baseline of the Based and JRT papers.

    a, z = W_in x, W_gate x        u = silu(conv(a))        dt, B, C = W_x u        dt = softplus(W_dt dt + bias)
    y = W_out( (scan(u, dt, -exp(A_log), B, C) + D u) * silu(z) )

A Mamba model has no MLP (`mlp_type: none`). Plain PyTorch, without external packages. Tensor parallelism shards by
channel; dt, B and C are sums over channels and need a second reduction inside the layer. The released code has one projection
for a and z; here its halves are two parameters.
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
from megatron.ops.conv import conv_step_, next_history
from megatron.ops.modules import ShortConv, row_linear
from megatron.ops.precision import in_accumulation_dtype, sum_dtype
from megatron.ops.selective_scan import scan_gate, selective_scan, selective_step, selective_step_
from megatron.ops.summary.selective import selective_summary


class ChannelSum(nn.Module):
    """A second reduction inside the layer: reduces partial sums, then continues on separate channels."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce_from_tp: nn.Module = nn.Identity()
        self.copy_to_tp: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """A partial sum of any shape -> the sum over all ranks, on every rank."""
        return self.copy_to_tp(self.reduce_from_tp(x))


class Mamba(Layer):
    """The Mamba-1 mixer, which has no heads."""

    names: ClassVar[tuple[str, ...]] = ("mamba",)
    uses_heads: ClassVar[bool] = False
    tp_reductions: ClassVar[int] = 2
    steps_by_slot: ClassVar[bool] = True
    context_parallel: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Config(LayerConfig):
        """Options of a Mamba layer."""

        state_size: int = 16
        """State size N per channel."""
        conv_width: int = 4
        """Kernel size of the causal convolution."""
        expand: int = 2
        """Channels of the layer per channel of the model."""
        dt_rank: int = 0
        """Width of the low-rank projection of the step sizes; 0 takes hidden_size / 16, rounded up."""
        use_bias_in_conv: bool = True
        """Bias of the convolution."""
        use_bias_in_linears: bool = False
        """Biases of the projections into and out of the layer."""

        def resolved(self) -> LayerConfig:
            """Resolves the width of the low-rank projection."""
            return replace(self, dt_rank=self.dt_rank or math.ceil(self.hidden_size / 16))

        def tp_divisor(self) -> int:
            """The number of channels of the layer."""
            return self.expand * self.hidden_size

        def cp_halo(self) -> int:
            """The convolution's history."""
            return self.conv_width - 1

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        d, inner, bias = config.hidden_size, config.expand * config.hidden_size, config.use_bias_in_linears
        self.width, self.states = config.conv_width, config.state_size
        self.dt_rank = config.dt_rank or math.ceil(d / 16)
        self.in_proj = nn.Linear(d, inner, bias=bias)
        self.gate_proj = nn.Linear(d, inner, bias=bias)
        self.conv1d = ShortConv(inner, config.conv_width, config.use_bias_in_conv)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * config.state_size, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, inner, bias=True)
        self.A_log = nn.Parameter(torch.zeros(inner, config.state_size))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, d, bias=bias)
        self.channel_sum = ChannelSum()

    def _selection(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step sizes [..., channels] and B, C [..., n] of u [..., channels]."""
        projected = self.channel_sum(self.x_proj(u))
        dt, b, c = projected.split([self.dt_rank, self.states, self.states], -1)
        return F.softplus(in_accumulation_dtype(self.dt_proj(dt))), b, c

    def _rates(self) -> Tensor:
        """A, [channels, n], negative."""
        return -in_accumulation_dtype(self.A_log).exp()

    def _out(self, y: Tensor, u: Tensor, z: Tensor, backend: str) -> Tensor:
        return row_linear(self.out_proj, scan_gate(y, u, self.D, z, backend=backend), self.reduce_from_tp)

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """`x [b, s, d]` -> `y [b, s, d]`; see `Layer.forward`."""
        x = self.copy_to_tp(x)
        a = self.in_proj(x)
        if ctx.mask is not None:
            a = a * ctx.mask[..., None].to(a.dtype)
        history = ctx.history(a, self.width - 1, state, "conv")
        u = self.conv1d(a, history, ctx.segment_ids, ctx.backend)
        dt, b, c = self._selection(u)
        if ctx.mask is not None:
            dt = dt * ctx.mask[..., None].to(dt.dtype)
        rates = self._rates()
        start = ctx.start_async(state, "ssm", lambda: selective_summary(u, dt, rates, b, ctx.segment_ids, ctx.backend))
        z = self.gate_proj(x)
        y, after = selective_scan(u, dt, rates, b, c, state=start(), segment_ids=ctx.segment_ids, backend=ctx.backend)
        y = self._out(y, u, z, ctx.backend)
        return y, None if state is None else {
            "ssm": after,
            "conv": next_history(a, history, self.width, ctx.mask, ctx.segment_ids),
        }

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """`x [b, d]` -> `y [b, d]` with one state update; see `Layer.step`."""
        x = self.copy_to_tp(x)
        if ctx.in_place:
            slots, backend, conv = ctx.slots, ctx.backend, self.conv1d
            u = conv_step_(self.in_proj(x), conv.weight, state["conv"], conv.bias, slots=slots, backend=backend)
            dt, b, c = self._selection(u)
            y = selective_step_(u, dt, self._rates(), b, c, state["ssm"], slots=slots, backend=backend)
            return self._out(y, u, self.gate_proj(x), backend), state
        a, history = self.in_proj(x).unsqueeze(1), state["conv"]
        u = self.conv1d(a, history, backend=ctx.backend).squeeze(1)
        dt, b, c = self._selection(u)
        y, after = selective_step(u, dt, self._rates(), b, c, state["ssm"])
        return self._out(y, u, self.gate_proj(x), ctx.backend), {"ssm": after, "conv": next_history(a, history, self.width)}

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> State:
        """ssm [b, channels, n] in fp32 (fp64 for an fp64 model), conv [b, width - 1, channels] in the model's dtype."""
        inner, n = self.A_log.shape
        return {
            "ssm": torch.zeros(batch, inner, n, dtype=sum_dtype(dtype), device=device),
            "conv": torch.zeros(batch, self.width - 1, inner, dtype=dtype, device=device),
        }

    def plan(self) -> Mapping[str, str]:
        """Sharded by channel."""
        kinds = {"conv1d.weight": "heads", "conv1d.bias": "heads", "A_log": "heads", "D": "heads"}
        kinds |= {"x_proj.weight": "row", "out_proj.weight": "row", "out_proj.bias": "replicated"}
        return {name: kinds.get(name, "column") for name, _ in self.named_parameters()}

    def init_rules(self) -> Mapping[str, str]:
        """As in the original: PyTorch's uniform rule for matrices, A = -(1 .. n), D = 1, step sizes of 0.001 to 0.1.

        `mixer_init: methods` draws the matrices, except that of the step sizes, with GPT-NeoX's two init methods.
        """
        roles = {"A_log": "log_range", "D": "ones", "dt_proj.bias": "step_size", "out_proj.weight": "uniform_output"}
        roles |= dict.fromkeys(("in_proj.weight", "gate_proj.weight", "x_proj.weight"), "uniform_input")
        roles["conv1d.bias"] = f"uniform {self.width**-0.5}"
        return {n: roles.get(n, "zeros" if n.endswith("bias") else "conv") for n, _ in self.named_parameters()}

    def no_decay(self) -> tuple[str, ...]:
        """A and D are decay rates and gains, not projections."""
        return ("A_log", "D")

    def flops(self, seq_length: int) -> float:
        """Projections, convolution, and about nine operations per channel and state (Mamba's own count)."""
        inner, n = self.A_log.shape
        matrices = sum(p.numel() for name, p in self.named_parameters() if name.endswith("proj.weight"))
        return 2.0 * matrices + 2.0 * self.width * inner + 9.0 * inner * n
