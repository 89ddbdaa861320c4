"""What vLLM is told when a process starts: configurations and models of exported folders, and their rules.

The families of transformers itself (Llama, GPT-NeoX, Mistral, Bloom, MPT) need none of this: vLLM has its own models of them.
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
        MODELS_CONFIG_MAP.setdefault(architecture, ServingRules)  # without an entry a model without attention has no page size
