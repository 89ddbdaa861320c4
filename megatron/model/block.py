"""The residual block around any token mixer: x + mixer(norm(x)), then x + mlp(norm(x)), or both sublayers in parallel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.layers.base import Context, Layer, State
from megatron.model.config import ModelConfig
from megatron.model.mlp import MLP
from megatron.model.norm import Norm

Stream = Tensor | tuple[Tensor, Tensor]
"""The residual stream [..., d]; or two parts of it whose sum the next norm forms, in one kernel with the norm."""


class Block(nn.Module):
    """Pre-norm. `hidden_dropout` acts on the output of each sublayer, as in GPT-NeoX.

    A model without an MLP (Mamba) has the first sublayer only. With `residual_fp32` the stream x is fp32 and the norms cast the
    input of a sublayer to the dtype of its weights.
    Sequential, or parallel (GPT-J, Pythia): x + mixer(norm1(x)) + mlp(norm2(x)), where norm2 is norm1 with `shared_norm`.
    """

    def __init__(self, config: ModelConfig, mixer: Layer) -> None:
        super().__init__()
        d = config.hidden_size
        self.dropout, self.parallel, self.wide = config.hidden_dropout, config.parallel_residual, config.residual_fp32
        no_mlp = config.mlp == "none"
        self.token_norm = Norm(config.norm, d, config.norm_eps)
        self.token_mixer = mixer
        self.channel_norm = None if config.shared_norm or no_mlp else Norm(config.norm, d, config.norm_eps)
        mlp = None if no_mlp else MLP(config.mlp, d, config.mlp_width, config.activation, config.mlp_bias)
        self.channel_mixer = mlp

    def pack_weights(self) -> None:
        """Make parameters that a fused path reads as one matrix contiguous; called once, after initialisation or loading."""
        self.token_mixer.pack_weights()
        if self.channel_mixer is not None:
            self.channel_mixer.pack_weights()

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def _stream(self, x: Tensor) -> Tensor:
        """The residual stream, cast to fp32 with `residual_fp32`."""
        return x.float() if self.wide and x.element_size() < 4 else x

    def _inner(self, x: Tensor) -> torch.dtype:
        """Dtype of the sublayers' inputs: that of the weights with `residual_fp32`, else that of x."""
        if not self.wide:
            return x.dtype
        return next((p.dtype for p in self.token_mixer.parameters() if p.is_floating_point()), x.dtype)

    def _enter(self, x: Stream, backend: str) -> tuple[Tensor, Tensor]:
        """(residual stream, normed input of the mixer)."""
        if isinstance(x, tuple):
            return self.token_norm(x[0], self._inner(x[0]), backend, added=x[1])
        x = self._stream(x)
        return x, self.token_norm(x, self._inner(x), backend)

    def _add(self, x: Tensor, normed: Tensor, mixed: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        """(stream, output of the last sublayer), whose sum is the output of the block."""
        mixed = self._drop(mixed)
        if self.channel_mixer is None:
            return x, mixed
        if self.channel_norm is None or self.parallel:
            after = x + mixed
            inner = normed if self.channel_norm is None else self.channel_norm(x, self._inner(x), backend)
        else:
            after, inner = self.channel_norm(x, self._inner(x), backend, added=mixed)
        return after, self._drop(self.channel_mixer(inner, backend))

    def forward(self, x: Stream, ctx: Context, state: State | None = None, in_parts: bool = False) -> tuple[Any, State | None]:
        """`x [b, s, d]` -> `[b, s, d]`, with the mixer's state as in `Layer.forward`.

        Args:
            x: the residual stream, or the two parts that the previous block returned.
            ctx: context of the pass.
            state: state of the mixer.
            in_parts: return the stream as two parts, for the next block.
        """
        x, normed = self._enter(x, ctx.backend)
        y, state = self.token_mixer(normed, ctx, state)
        stream, added = self._add(x, normed, y, ctx.backend)
        return (stream, added) if in_parts else stream + added, state

    def step(self, x: Stream, state: State, ctx: Context, in_parts: bool = False) -> tuple[Any, State]:
        """`x [b, d]` -> `[b, d]`, one decode step; arguments as in `forward`."""
        x, normed = self._enter(x, ctx.backend)
        y, state = self.token_mixer.step(normed, state, ctx)
        stream, added = self._add(x, normed, y, ctx.backend)
        return (stream, added) if in_parts else stream + added, state
