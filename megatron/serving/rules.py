"""Checks and settings before vLLM builds a model: options that would give wrong outputs are rejected."""

from __future__ import annotations

from typing import Any

from vllm.config import CompilationMode, CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.models.config import MambaModelConfig

from megatron.errors import ConfigError
from megatron.model.build import check_tensor_parallel
from megatron.model.config import ModelConfig
from megatron.serving.folder_config import cache_kind, model_shape, two_way_tokens

logger = init_logger("vllm.linear_neox")


class ServingRules(MambaModelConfig):
    """vLLM's hook for the configuration of a served folder."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Reject options that would give wrong outputs, and set those that the model needs.

        Raises:
            ConfigError: an option is incompatible with the model's states or two-way prefix.
        """
        shape = model_shape(vllm_config.model_config.hf_config)
        check_tensor_parallel(shape, vllm_config.parallel_config.tensor_parallel_size)
        _refuse_unsupported(vllm_config, shape)
        # plain Python splits the batch into steps and passes; it can be neither compiled nor captured in a CUDA graph
        vllm_config.compilation_config.mode = CompilationMode.NONE
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
        if two_way := two_way_tokens(shape):
            disable_chunked_prefill(vllm_config, two_way)
        if cache_kind(shape) != "attention":
            super().verify_and_update_config(vllm_config)


def _refuse_unsupported(vllm_config: Any, shape: ModelConfig) -> None:
    """Reject unsupported options; turns prefix caching off for models with recurrent states."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    states = cache_kind(shape) != "attention"
    if parallel.pipeline_parallel_size > 1:
        raise ConfigError("pipeline parallelism is not served", hint="--tensor-parallel-size shards by the mixers' plan()")
    if vllm_config.quant_config is not None or vllm_config.model_config.quantization is not None:
        raise ConfigError("quantised weights are not served", why="mixers run on the weights of the folder")
    if states and vllm_config.speculative_config is not None:
        raise ConfigError(
            "speculative decoding is not served", why="a recurrent state cannot be rolled back after rejected tokens"
        )
    if states and cache.enable_prefix_caching:  # vLLM's default for hybrid models
        logger.warning(
            "Prefix caching is off: recurrent states are stored after the last token only, not at earlier positions."
        )
        cache.enable_prefix_caching = False


def disable_chunked_prefill(vllm_config: Any, two_way: int) -> None:
    """Turn chunked prefill off: the first pass over a text must contain its whole prefix, as in training.

    `max_num_batched_tokens` is raised to `max_model_len` if it is smaller. Prefix caching is off too: the tokens of a two-way
    prefix see each other, so the activations of equal tokens depend on the tokens after them.
    """
    scheduler, length = vllm_config.scheduler_config, vllm_config.model_config.max_model_len
    if scheduler.enable_chunked_prefill or scheduler.max_num_batched_tokens < length:
        logger.warning("The first %d tokens of a text see each other: chunked prefill is off.", two_way)
    vllm_config.cache_config.enable_prefix_caching = False
    scheduler.enable_chunked_prefill = False
    scheduler.long_prefill_token_threshold = 0
    scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, length)
