"""The configuration classes of exported folders as vLLM reads them: the same fields, and which of three models serves them.

vLLM decides by the class of a model, before it builds one, whether it keeps pages of keys and values, pages of states, or both.
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
"""What a model keeps of a text -> the name of the class that serves it."""


def two_way_tokens(shape: ModelConfig) -> int:
    """Tokens at the start of a text that layers read in both directions (JRT's prefix)."""
    with torch.device("meta"):
        kinds = {name: build_mixer(shape, i) for i, name in enumerate(shape.layer_types)}
    return max(mixer.two_way(Context()) for mixer in kinds.values())


def attention_layers(shape: ModelConfig) -> list[int]:
    """Numbers of the blocks whose mixers keep keys and values, which vLLM's own attention takes over.

    Beside two-way layers a window is kept as a state: what never grows is never preempted, and a preempted text would be read
    again with what was written as part of its prompt.
    """
    two_way, found = two_way_tokens(shape), {}
    for name in dict.fromkeys(shape.layer_types):
        state = empty_state(shape, shape.layer_types.index(name))
        found[name] = is_cache(state) and not (two_way and state["keys"].shape[1])
    return [index for index, name in enumerate(shape.layer_types) if found[name]]


def empty_state(shape: ModelConfig, index: int) -> State:
    """Of a block's mixer, one row, without memory."""
    with torch.device("meta"):
        state: State = build_mixer(shape, index).init_state(1, torch.float32, "meta")
    return state


def kept(shape: ModelConfig) -> str:
    """`states`, `attention` or `both`."""
    count = len(attention_layers(shape))
    return "states" if not count else "attention" if count == shape.num_layers else "both"


def model_shape(config: Any) -> ModelConfig:
    """The `ModelConfig` of a folder's configuration."""
    return ModelConfig.from_dict(config.model_fields())


class ServedLinearLMConfig(LinearLMConfig):
    """`linear_lm` folders; heads as vLLM counts them: those of attention, else parts that tensor parallelism can make."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        shape = model_shape(self)
        self.architectures = [ARCHITECTURES[kept(shape)]]
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
        """As the folder says them."""
        return {**self.architecture, "vocab_size": self.vocab_size, "tie_embeddings": self.tie_word_embeddings}


class ServedMetaLAConfig(MetaLAConfig):
    """`metala` folders, and the released ones."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.architectures = [ARCHITECTURES["states"]]


SERVED_CONFIGS = (ServedLinearLMConfig, ServedMetaLAConfig)
