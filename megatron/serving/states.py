"""Pages of states in vLLM: one layer of vLLM's Mamba type per page, and the metadata that assigns a batch's rows to pages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.linear_attn import LinearAttentionBackend
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from megatron.errors import ConfigError
from megatron.layers.base import Context, Layer, State
from megatron.serving.batch import Rows, arrange, run_batch
from megatron.serving.folder_config import attention_layers, model_shape, two_way_tokens
from megatron.serving.pages import Page


class RowsBuilder(AttentionMetadataBuilder[Rows]):
    """Splits each step's batch once for all layers."""

    reorder_batch_threshold = 1
    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        check_room(vllm_config)

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False) -> Rows:
        """The rows of a step."""
        common = common_attn_metadata
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
        lengths = common.seq_lens_cpu_upper_bound[: common.num_reqs].tolist()
        seen = [length - (end - begin) for length, begin, end in zip(lengths, starts, starts[1:], strict=False)]
        return arrange(starts, seen, common.block_table_tensor[: common.num_reqs, 0].long())


def check_room(vllm_config: Any) -> None:
    """Reject a cache in which a sequence of a model with two-way layers and attention could be preempted.

    A preempted sequence is prefilled again with its generated tokens as part of the prompt, where they could enter the two-way
    prefix. States have a fixed size, so a sequence of a model without a KV cache is never preempted.

    Raises:
        ConfigError: the KV cache of `max_num_seqs` sequences of `max_model_len` tokens does not fit.
    """
    shape = model_shape(vllm_config.model_config.hf_config)
    blocks, cache, growing = vllm_config.cache_config.num_gpu_blocks, vllm_config.cache_config, len(attention_layers(shape))
    if not blocks or not growing or not two_way_tokens(shape):
        return
    # an upper bound, for any grouping of layers in vLLM
    each = growing * -(-vllm_config.model_config.max_model_len // cache.block_size) + shape.num_layers - growing
    if blocks - 1 < each * vllm_config.scheduler_config.max_num_seqs:
        raise ConfigError(
            f"{blocks} pages are too few for {vllm_config.scheduler_config.max_num_seqs} sequences of up to "
            f"{vllm_config.model_config.max_model_len} tokens",
            why="a preempted sequence is prefilled again, and a two-way layer would treat its generated tokens as prompt",
            hint="lower --max-num-seqs or --max-model-len, or give the cache more memory",
        )


class RowsBackend(LinearAttentionBackend):
    """vLLM's backend that selects `RowsBuilder`."""

    @staticmethod
    def get_name() -> str:
        """Name in vLLM's log."""
        return "LINEAR_NEOX"

    @staticmethod
    def get_builder_cls() -> type[Any]:
        """The builder of `Rows`."""
        return RowsBuilder


class StatePages(MambaBase):
    """One page per sequence: vLLM allocates the memory, layers look up their states by the index of their block."""

    def __init__(self, name: str, page: Page, context: dict[str, Any]) -> None:
        self.name, self.page = name, page
        self.kv_cache: Any = ()
        self.states: dict[int, State] = {}
        context[name] = self

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """One page, in bytes."""
        return ((self.page.nbytes,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Pages are bytes."""
        return (torch.int8,)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """vLLM's generic type; the metadata builder is ours."""
        return MambaAttentionBackendEnum.LINEAR

    def get_attn_backend(self) -> type[Any]:
        """The backend with our builder."""
        return RowsBackend

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Create views of the layers' states in vLLM's buffer [pages, 1, 1, bytes]."""
        raw = kv_cache.squeeze((1, 2))
        self.kv_cache, self.states = (raw,), self.page.views(raw)

    def rows(self) -> Rows | None:
        """Rows of the current step; None while vLLM profiles memory."""
        metadata = get_forward_context().attn_metadata
        return None if metadata is None else metadata[self.name]


class StateMixer(nn.Module):
    """A mixer with a state of fixed size in a served block."""

    def __init__(self, mixer: Layer, layer: int, pages: StatePages) -> None:
        super().__init__()
        self.mixer, self.layer, self.pages = mixer, layer, pages

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """`x [1, n, d]`, the flat batch -> `y [1, n, d]`."""
        rows = self.pages.rows()
        if rows is None:
            return self.mixer(x, ctx)[0], None
        return run_batch(self.mixer, x[0], self.pages.states[self.layer], rows, ctx).unsqueeze(0), None
