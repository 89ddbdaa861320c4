"""vLLM's plugin: registers the configurations, models and serving rules of exported folders when a process starts.

Folders of transformers' own classes (Llama, GPT-NeoX, Mistral, Bloom, MPT) do not need it: vLLM implements these models.
"""

from __future__ import annotations

from transformers import AutoConfig
from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP

from megatron.serving.folder_config import ARCHITECTURES, SERVED_CONFIGS
from megatron.serving.rules import ServingRules


def register() -> None:
    """Register everything; a second call in one process changes nothing."""
    for config in SERVED_CONFIGS:
        AutoConfig.register(config.model_type, config, exist_ok=True)
    for architecture in ARCHITECTURES.values():
        if architecture not in ModelRegistry.models:
            ModelRegistry.register_model(architecture, f"megatron.serving.model:{architecture}")
        MODELS_CONFIG_MAP.setdefault(architecture, ServingRules)  # otherwise a model without attention has no page size
