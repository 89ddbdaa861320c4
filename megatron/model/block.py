"""The residual block around any token mixer: x + mixer(norm(x)), then x + mlp(norm(x))."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.layers.base import Context, Layer, State
from megatron.model.config import ModelConfig
from megatron.model.mlp import MLP
from megatron.model.norm import Norm


class Block(nn.Module):
    """Pre-norm, sequential residual. `hidden_dropout` acts on what each half adds, as in GPT-NeoX."""

    def __init__(self, config: ModelConfig, mixer: Layer) -> None:
        super().__init__()
        d = config.hidden_size
        self.dropout = config.hidden_dropout
        self.token_norm = Norm(config.norm, d, config.norm_eps)
        self.token_mixer = mixer
        self.channel_norm = Norm(config.norm, d, config.norm_eps)
        self.channel_mixer = MLP(config.mlp, d, config.mlp_width, config.activation, config.mlp_bias)

    def _channel(self, x: Tensor) -> Tensor:
        return x + self._drop(self.channel_mixer(self.channel_norm(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """`x [b, s, d]` -> `[b, s, d]`, with the mixer's state as in `Layer.forward`."""
        y, state = self.token_mixer(self.token_norm(x), ctx, state)
        return self._channel(x + self._drop(y)), state

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """`x [b, d]` -> `[b, d]`, one decode step."""
        y, state = self.token_mixer.step(self.token_norm(x), state, ctx)
        return self._channel(x + y), state
