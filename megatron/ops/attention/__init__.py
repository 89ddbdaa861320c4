"""Softmax attention with ALiBi, rotary embeddings or windows, and its cache."""

from megatron.ops.attention.cache import Mixing, empty_cache, mix
from megatron.ops.attention.operator import (
    Places,
    Rule,
    alibi_columns,
    alibi_slopes,
    attention,
    attention_reference,
    visible,
)

__all__ = [
    "Mixing",
    "Places",
    "Rule",
    "alibi_columns",
    "alibi_slopes",
    "attention",
    "attention_reference",
    "empty_cache",
    "mix",
    "visible",
]
