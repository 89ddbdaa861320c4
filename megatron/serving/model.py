"""Model classes for vLLM: the trainer's model, one tensor-parallel shard per process, with states in vLLM's pages.

There is no second implementation: blocks, norms, embedding and mixers are those of training, sharded by the same `plan()`.
vLLM's flat batch of all sequences' new tokens passes through them as a single row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.distributed import get_tp_group, tensor_model_parallel_all_gather

from megatron.errors import CheckpointError, ConfigError
from megatron.layers.base import Context, Layer
from megatron.model.build import build_model, param_specs
from megatron.model.config import ModelConfig
from megatron.model.lm import LanguageModel
from megatron.model.mlp import MLP
from megatron.parallel.mesh import Mesh
from megatron.parallel.tensor import local_slice, replace_parameters, shard_model, take
from megatron.serving.attention import AttentionMixer, Positions
from megatron.serving.folder_config import attention_layers, cache_kind, model_shape
from megatron.serving.pages import Page, lay_out
from megatron.serving.states import StateMixer, StatePages


def padded(shape: ModelConfig, parts: int) -> ModelConfig:
    """The same model with its vocabulary padded to a multiple of `parts` ranks."""
    return replace(shape, vocab_size=-(-shape.vocab_size // parts) * parts)


def shard_on_meta(shape: ModelConfig, mesh: Mesh) -> LanguageModel:
    """One rank's shard of a model, on the meta device."""
    with torch.device("meta"):
        model = build_model(shape)
        shard_model(model, param_specs(shape), mesh)
    return model.eval()


def state_pages(shape: ModelConfig, model: LanguageModel, dtype: torch.dtype) -> list[Page]:
    """The page layouts of the layers whose states have a fixed size."""
    attention, blocks = set(attention_layers(shape)), model.model.blocks()
    states = {i: b.token_mixer.init_state(1, dtype, "meta") for i, b in enumerate(blocks) if i not in attention}
    try:
        return lay_out(states, together=cache_kind(shape) == "states")
    except ValueError as error:
        raise ConfigError("a layer's state cannot be kept in a page", why=str(error)) from None


class ServedModel(nn.Module):
    """A causal language model with vLLM's interface."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        hf_config = vllm_config.model_config.hf_config
        group = get_tp_group()
        size, rank = group.world_size, group.rank_in_group
        self.mesh = Mesh(1, 1, size, rank, tp_group=group.device_group if size > 1 else None)
        self.vocab_size = model_shape(hf_config).vocab_size
        self.reachable = getattr(hf_config, "unpadded_vocab_size", None) or self.vocab_size
        self.shape = padded(model_shape(hf_config), size)
        self.lm = shard_on_meta(self.shape, self.mesh)
        _allocate(self.lm, vllm_config.device_config.device)
        self.parts = dict(self.lm.named_parameters())  # keyed by checkpoint names, which the wrappers would change
        self._wrap(vllm_config)

    def _wrap(self, vllm_config: Any) -> None:
        """Replace every mixer by a wrapper that uses vLLM's pages."""
        context = vllm_config.compilation_config.static_forward_context
        count = self.shape.num_layers
        pages = state_pages(self.shape, self.lm, torch.get_default_dtype())
        owners: dict[int, StatePages] = {}
        for number, page in enumerate(pages):
            owner = StatePages(f"states.{count + number}", page, context)
            owners |= {cell.layer: owner for cell in page.cells}
        for index, block in enumerate(self.lm.model.blocks()):
            mixer: Layer = block.token_mixer
            if index in owners:
                served: nn.Module = StateMixer(mixer, index, owners[index])
            else:
                served = AttentionMixer(mixer, f"layers.{index}.attn", vllm_config, self.shape.hidden_size)
            block.token_mixer = served  # type: ignore[assignment]

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Token ids [n] -> embeddings [n, d], without positions."""
        return self.lm.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Tokens [n] of all sequences and their positions [n] -> hidden states [n, d] after the final norm."""
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_input_ids(input_ids)
        x, _after = self.lm.model.embed_tokens.finish(inputs_embeds.unsqueeze(1), Context(), {"seen": positions})
        ctx = Context(inputs=(Positions(positions.unsqueeze(0)),))
        x = x.transpose(0, 1)
        for block in self.lm.model.blocks():
            x, _after = block(x, ctx)
        return self.lm.model.final_norm(x.squeeze(0))

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Logits [n, vocabulary] of hidden states [n, d]; ids that only pad the vocabulary get -inf."""
        logits = self.lm.lm_head(hidden_states)
        if self.mesh.tp > 1:
            logits = tensor_model_parallel_all_gather(logits)
        logits = logits[:, : self.vocab_size]
        if self.reachable < self.vocab_size:
            logits[:, self.reachable :] = -torch.inf
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load this rank's shard of every weight of the folder.

        Raises:
            CheckpointError: a weight is missing, unknown, or of another shape.
        """
        specs, missing = param_specs(self.shape), set(self.parts)
        for name, whole in weights:
            if name == "lm_head.weight" and self.shape.tie_embeddings:
                continue
            if name not in self.parts:
                raise CheckpointError(f"the folder has a weight '{name}' that the model does not have")
            full = self._with_rows(whole) if specs[name].cut == "vocab" else whole
            if tuple(full.shape) != specs[name].shape:
                raise CheckpointError(f"'{name}' is {tuple(whole.shape)} in the folder, the model has {specs[name].shape}")
            self.parts[name].data.copy_(take(full, local_slice(specs[name], self.mesh)))
            missing.discard(name)
        if missing:
            raise CheckpointError(f"the folder lacks {len(missing)} weights", why=f"the first is '{min(missing)}'")
        for module in self.lm.modules():
            if isinstance(module, (Layer, MLP)) and next(module.parameters()).is_cuda:
                module.pack_weights()
        return {name for name, _ in self.named_parameters()}

    def _with_rows(self, whole: Tensor) -> Tensor:
        """Pad a matrix over the vocabulary with rows of zeros to the padded vocabulary size."""
        if len(whole) != self.vocab_size or self.vocab_size == self.shape.vocab_size:
            return whole
        return torch.cat([whole, whole.new_zeros(self.shape.vocab_size - self.vocab_size, *whole.shape[1:])])

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> tuple[tuple[int, ...], ...]:
        """Size of a state page in bytes; vLLM makes attention pages at least as large."""
        shape, size = model_shape(vllm_config.model_config.hf_config), vllm_config.parallel_config.tensor_parallel_size
        shape = padded(shape, size)
        model = shard_on_meta(shape, Mesh.shape_only(1, size, size, 0))
        return ((max(page.nbytes for page in state_pages(shape, model, vllm_config.model_config.dtype)),),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype, ...]:
        """Pages of states are bytes."""
        return (torch.int8,)


def _allocate(model: LanguageModel, device: torch.device | str) -> None:
    """Allocate the parameters of a model on the meta device; tied parameters stay tied."""
    new = {id(p): nn.Parameter(torch.empty_like(p, device=device), requires_grad=False) for p in model.parameters()}
    replace_parameters([model], new)


class LinearNeoxStateForCausalLM(ServedModel):
    """A model with recurrent states only."""

    has_inner_state: ClassVar[bool] = True
    is_attention_free: ClassVar[bool] = True


class LinearNeoxHybridForCausalLM(ServedModel):
    """A model with recurrent states and a KV cache."""

    has_inner_state: ClassVar[bool] = True
    is_hybrid: ClassVar[bool] = True


class LinearNeoxAttentionForCausalLM(ServedModel):
    """A model with a KV cache only."""
