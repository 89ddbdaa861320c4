"""Attention layers of ours over vLLM's own attention and its paged keys and values.

A layer that calls `mix` (`ops/attention/cache.py`) is given a state that is kept elsewhere. What it asks of its attention
(heads, widths, window, slopes) is read off one token that it is run on when the model is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform

from megatron.errors import ConfigError
from megatron.layers.base import Context, Layer, LayerInputs, State
from megatron.ops.attention.cache import Mixing, OuterCache


@dataclass(frozen=True)
class Positions(LayerInputs):
    """Of a flat batch: `positions [1, n]` of the tokens within their texts."""

    positions: Tensor | None = None


class _Probe(OuterCache):
    """Writes down what a layer asks for."""

    def __init__(self, device: torch.device) -> None:
        self.places = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.asked: list[tuple[Tensor, Tensor, Mixing]] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, how: Mixing) -> Tensor:
        self.asked.append((q, k, how))
        return torch.zeros_like(q)


class _Pages(OuterCache):
    """Hands tokens to vLLM's attention, heads padded to a width that it has."""

    def __init__(self, attention: Attention, places: Tensor) -> None:
        self.attention: Any = attention
        self.places = places

    def attend(self, q: Tensor, k: Tensor, v: Tensor, how: Mixing) -> Tensor:
        width = q.shape[-1]
        parts = [F.pad(t[0], (0, self.attention.head_size - width)).flatten(-2) for t in (q, k, v)]
        return self.attention(*parts).unflatten(-1, (-1, self.attention.head_size))[..., :width].unsqueeze(0)


def served_width(width: int) -> int:
    """The smallest head width of the platform's attention that holds `width`.

    Raises:
        ConfigError: none is wide enough.
    """
    if not current_platform.is_cpu():
        return -(-width // 8) * 8
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    widths = [n for n in sorted(CPUAttentionBackend.get_supported_head_sizes()) if n >= width]
    if not widths:
        raise ConfigError(f"vLLM's attention on a CPU has no heads of width {width}")
    return widths[0]


class AttentionMixer(nn.Module):
    """A mixer of keys and values in a served block."""

    def __init__(self, mixer: Layer, name: str, vllm_config: Any, hidden_size: int) -> None:
        """`name` of the layer for vLLM, with one number in it.

        Raises:
            ConfigError: the layer asks for something that vLLM's attention has not.
        """
        super().__init__()
        self.mixer = mixer
        some = next(mixer.parameters())
        probe = _Probe(some.device)
        mixer(torch.zeros(1, 1, hidden_size, dtype=some.dtype, device=some.device), Context(), probe)
        if len(probe.asked) != 1:
            raise ConfigError(f"{type(mixer).__name__} attends {len(probe.asked)} times in a pass: served is once")
        (q, k, how), rule = probe.asked[0], probe.asked[0][2].rule
        if how.train_length is not None and rule.slopes is not None:
            raise ConfigError("ALiBi slopes that shrink with a text's length (train_length) are not served")
        self.attention = Attention(
            q.shape[2],
            served_width(q.shape[3]),
            rule.scale,
            num_kv_heads=k.shape[2],
            alibi_slopes=None if rule.slopes is None else rule.slopes.tolist(),
            cache_config=vllm_config.cache_config,
            per_layer_sliding_window=None if rule.window is None else rule.window + 1,  # theirs counts the token itself
            prefix=name,
        )

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """`x [1, n, d]`, the flat batch -> `y [1, n, d]`."""
        places = ctx.read(Positions).positions
        assert places is not None
        return self.mixer(x, ctx, _Pages(self.attention, places))[0], None
