"""Attention layers on vLLM's attention and its paged KV cache.

A layer that calls `mix` (`ops/attention/cache.py`) gets an external cache as its state. Its requirements (heads, head widths,
window, slopes) are recorded in a forward pass over one token when the model is built.
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
    """`positions [1, n]` of the tokens of a flat batch within their sequences."""

    positions: Tensor | None = None


class _Probe(OuterCache):
    """Records the attention calls of a layer."""

    def __init__(self, device: torch.device) -> None:
        self.places = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.calls: list[tuple[Tensor, Tensor, Mixing]] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, how: Mixing) -> Tensor:
        self.calls.append((q, k, how))
        return torch.zeros_like(q)


class _Pages(OuterCache):
    """Passes tokens to vLLM's attention, with heads padded to a supported width."""

    def __init__(self, attention: Attention, places: Tensor) -> None:
        self.attention: Any = attention
        self.places = places

    def attend(self, q: Tensor, k: Tensor, v: Tensor, how: Mixing) -> Tensor:
        width = q.shape[-1]
        parts = [F.pad(t[0], (0, self.attention.head_size - width)).flatten(-2) for t in (q, k, v)]
        return self.attention(*parts).unflatten(-1, (-1, self.attention.head_size))[..., :width].unsqueeze(0)


def served_width(width: int) -> int:
    """The smallest head width that the platform's attention supports and that is at least `width`.

    Raises:
        ConfigError: no supported width is large enough.
    """
    if not current_platform.is_cpu():
        return -(-width // 8) * 8
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    widths = [n for n in sorted(CPUAttentionBackend.get_supported_head_sizes()) if n >= width]
    if not widths:
        raise ConfigError(f"vLLM's attention on a CPU has no heads of width {width}")
    return widths[0]


class AttentionMixer(nn.Module):
    """An attention mixer in a served block."""

    def __init__(self, mixer: Layer, name: str, vllm_config: Any, hidden_size: int) -> None:
        """Wrap a mixer.

        Args:
            mixer: the attention layer.
            name: name of the layer in vLLM, which contains exactly one number.
            vllm_config: vLLM's configuration.
            hidden_size: width of the model.

        Raises:
            ConfigError: vLLM's attention lacks a feature that the layer needs.
        """
        super().__init__()
        self.mixer = mixer
        weight = next(mixer.parameters())
        probe = _Probe(weight.device)
        mixer(torch.zeros(1, 1, hidden_size, dtype=weight.dtype, device=weight.device), Context(), probe)
        if len(probe.calls) != 1:
            raise ConfigError(
                f"{type(mixer).__name__} calls attention {len(probe.calls)} times per pass; only a single call can be served"
            )
        (q, k, how), rule = probe.calls[0], probe.calls[0][2].rule
        if how.train_length is not None and rule.slopes is not None:
            raise ConfigError("ALiBi slopes that shrink with a text's length (train_length) are not served")
        self.attention = Attention(
            q.shape[2],
            served_width(q.shape[3]),
            rule.scale,
            num_kv_heads=k.shape[2],
            alibi_slopes=None if rule.slopes is None else rule.slopes.tolist(),
            cache_config=vllm_config.cache_config,
            per_layer_sliding_window=None if rule.window is None else rule.window + 1,  # vLLM counts the token itself
            prefix=name,
        )

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """`x [1, n, d]`, the flat batch -> `y [1, n, d]`."""
        places = ctx.read(Positions).positions
        assert places is not None
        return self.mixer(x, ctx, _Pages(self.attention, places))[0], None
