"""Outputs of the exported classes, with both of transformers' names for the cache.

Up to 5.23 the name is `past_key_values`, from 5.24 on `cache`; newer outputs of transformers also accept the old name.
These classes add the new name to older versions, so that both names work with every version.
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
    """`output.cache` for versions of transformers without that field."""
    if name == "cache":
        return output.past_key_values
    raise AttributeError(f"{type(output).__name__} has no attribute '{name}'")


@dataclass
class DecoderModelOutput(BaseModelOutputWithPast):
    """Hidden states and the cache, readable as `past_key_values` and as `cache`."""

    def __getattr__(self, name: str) -> Any:
        return _other_name(self, name)


@dataclass
class DecoderLMOutput(CausalLMOutputWithPast):
    """Loss, logits and the cache, readable as `past_key_values` and as `cache`."""

    def __getattr__(self, name: str) -> Any:
        return _other_name(self, name)
