"""vLLM's door: the entry point `vllm.general_plugins`, called in every process of a server; see `docs/serving.md`."""

from __future__ import annotations


def register() -> None:
    """Make vLLM know the models of exported folders; calling it again changes nothing."""
    from megatron.serving.plugin import register as register_models

    register_models()
