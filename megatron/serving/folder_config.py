"""Configuration classes of exported folders for vLLM: the same fields, and which of three model classes serves a folder.

The model class tells vLLM, before the model is built, whether to allocate a KV cache, a cache of states, or both.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from megatron.interop.linear_config import LinearLMConfig
from megatron.interop.metala_config import MetaLAConfig
from megatron.layers.base import Context, State
from megatron.model.build import build_mixer, mixer_config
from megatron.model.config import ModelConfig
from megatron.ops.attention.cache import is_cache

ARCHITECTURES = {
    "states": "LinearNeoxStateForCausalLM",
    "attention": "LinearNeoxAttentionForCausalLM",
    "both": "LinearNeoxHybridForCausalLM",
}
"""Kind of cache (see `cache_kind`) -> name of the model class."""


def two_way_tokens(shape: ModelConfig) -> int:
    """Number of tokens at the start of a text that layers read in both directions (JRT's prefix)."""
    with torch.device("meta"):
        kinds = {name: build_mixer(shape, i) for i, name in enumerate(shape.layer_types)}
    return max(mixer.two_way(Context()) for mixer in kinds.values())


def attention_layers(shape: ModelConfig) -> list[int]:
    """Indices of the blocks that run on vLLM's attention and KV cache.

    In a model with two-way layers, the window of windowed attention is a state instead: a state does not grow, so its sequence
    is never preempted. A preempted sequence would be prefilled again with its generated tokens as part of the prompt.
    """
    two_way, uses_kv_cache = two_way_tokens(shape), {}
    for name in dict.fromkeys(shape.layer_types):
        state = empty_state(shape, shape.layer_types.index(name))
        uses_kv_cache[name] = is_cache(state) and not (two_way and state["keys"].shape[1])
    return [index for index, name in enumerate(shape.layer_types) if uses_kv_cache[name]]


def empty_state(shape: ModelConfig, index: int) -> State:
    """The empty state of a block's mixer, batch size 1, on the meta device."""
    with torch.device("meta"):
        state: State = build_mixer(shape, index).init_state(1, torch.float32, "meta")
    return state


def cache_kind(shape: ModelConfig) -> str:
    """The caches that a model needs: `states`, `attention` or `both`."""
    count = len(attention_layers(shape))
    return "states" if not count else "attention" if count == shape.num_layers else "both"


def model_shape(config: Any) -> ModelConfig:
    """The `ModelConfig` of a folder's configuration."""
    return ModelConfig.from_dict(config.model_fields())


class ServedLinearLMConfig(LinearLMConfig):
    """`linear_lm` folders. The head counts for vLLM are those of attention, else the largest tensor-parallel size."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        shape = model_shape(self)
        self.architectures = [ARCHITECTURES[cache_kind(shape)]]
        layers = attention_layers(shape)
        if layers:
            state = empty_state(shape, layers[0])
            self.num_key_value_heads, self.head_dim = state["keys"].shape[2:]
        else:
            parts = [mixer_config(shape, name).tp_divisor() for name in dict.fromkeys(shape.layer_types)]
            self.num_attention_heads = math.gcd(*parts)
        if shape.learned_positions:
            self.max_position_embeddings = shape.learned_positions

    def model_fields(self) -> dict[str, Any]:
        """The fields of `ModelConfig`, as in the folder's config.json."""
        return {**self.architecture, "vocab_size": self.vocab_size, "tie_embeddings": self.tie_word_embeddings}


class ServedMetaLAConfig(MetaLAConfig):
    """`metala` folders, including the released models."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.architectures = [ARCHITECTURES["states"]]


SERVED_CONFIGS = (ServedLinearLMConfig, ServedMetaLAConfig)
