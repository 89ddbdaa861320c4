"""What is decided before a server builds a model, and what it refuses because an answer would be wrong."""

from __future__ import annotations

from typing import Any

from vllm.config import CompilationMode, CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.models.config import MambaModelConfig

from megatron.errors import ConfigError
from megatron.model.build import check_tensor_parallel
from megatron.model.config import ModelConfig
from megatron.serving.folder_config import kept, model_shape, two_way_tokens

logger = init_logger("vllm.linear_neox")


class ServingRules(MambaModelConfig):
    """vLLM asks this of every served folder."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Refuse what would give wrong answers, and set what the model needs.

        Raises:
            ConfigError: an option that the model's states or prefix cannot be served rightly with.
        """
        shape = model_shape(vllm_config.model_config.hf_config)
        check_tensor_parallel(shape, vllm_config.parallel_config.tensor_parallel_size)
        _refuse_unsupported(vllm_config, shape)
        # the batch is sorted into steps and passes by plain Python, which neither compiles nor can be recorded
        vllm_config.compilation_config.mode = CompilationMode.NONE
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
        if two_way := two_way_tokens(shape):
            read_prompts_whole(vllm_config, two_way)
        if kept(shape) != "attention":
            super().verify_and_update_config(vllm_config)


def _refuse_unsupported(vllm_config: Any, shape: ModelConfig) -> None:
    """Also turns prefix caching off where states have none."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    states = kept(shape) != "attention"
    if parallel.pipeline_parallel_size > 1:
        raise ConfigError("pipeline parallelism is not served", hint="--tensor-parallel-size cuts by the mixers' plan()")
    if vllm_config.quant_config is not None or vllm_config.model_config.quantization is not None:
        raise ConfigError("quantised weights are not served", why="mixers run on the weights of the folder")
    if states and vllm_config.speculative_config is not None:
        raise ConfigError("speculative decoding is not served", why="a recurrent state cannot take rejected tokens back")
    if states and cache.enable_prefix_caching:  # vLLM's default for hybrid models
        logger.warning("Prefix caching is off: a recurrent state is kept after the last token only, none at earlier ones.")
        cache.enable_prefix_caching = False


def read_prompts_whole(vllm_config: Any, two_way: int) -> None:
    """Prompts in one piece: the pass that begins a text must hold its whole prefix, as in training.

    A server whose `max_num_batched_tokens` is below `max_model_len` gets more of them. Prefix caching is off, since the tokens
    of a prefix see each other and the same ones mean something else in front of others.
    """
    scheduler, length = vllm_config.scheduler_config, vllm_config.model_config.max_model_len
    if scheduler.enable_chunked_prefill or scheduler.max_num_batched_tokens < length:
        logger.warning("The first %d tokens of a text see each other: prompts are read in one piece.", two_way)
    vllm_config.cache_config.enable_prefix_caching = False
    scheduler.enable_chunked_prefill = False
    scheduler.long_prefill_token_threshold = 0
    scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, length)
