"""Outputs of the exported classes, and the two names that transformers has had for the cache.

Up to 5.23 it is `past_key_values`, from 5.24 on `cache`; transformers' own outputs answer to the old name where they have the
new one. What follows adds the new name where they have the old one, so that both can be read with every version.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import Any

from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

CACHE_FIELD = "cache" if "cache" in {f.name for f in fields(BaseModelOutputWithPast)} else "past_key_values"
"""Name of the cache in outputs of the installed transformers."""
CACHE_ARGUMENT = (
    "cache" if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters else "past_key_values"
)
"""Name of the cache among the arguments that `generate` of the installed transformers sends."""


def _other_name(output: Any, name: str) -> Any:
    """`output.cache` where transformers has no such field yet."""
    if name == "cache":
        return output.past_key_values
    raise AttributeError(f"{type(output).__name__} has no attribute '{name}'")


@dataclass
class DecoderModelOutput(BaseModelOutputWithPast):
    """Hidden states and the cache, which can be read as `past_key_values` and as `cache`."""

    def __getattr__(self, name: str) -> Any:
        return _other_name(self, name)


@dataclass
class DecoderLMOutput(CausalLMOutputWithPast):
    """Loss, logits and the cache, which can be read as `past_key_values` and as `cache`."""

    def __getattr__(self, name: str) -> Any:
        return _other_name(self, name)
