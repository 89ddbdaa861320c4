"""The base model of an export: a `PreTrainedModel` around the trainer's embedding and blocks, from tokens to hidden states.

It is packed into every exported folder, after `megatron/model` and the mixers in the same file. It contains no mathematics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from megatron.export.hf_cache import RecurrentCache, resolve_cache
from megatron.export.hf_inputs import (
    Compaction,
    Documents,
    check_mask,
    check_tokens,
    check_unknown,
    compaction,
    tokens_before,
)
from megatron.export.hf_outputs import CACHE_FIELD, DecoderModelOutput
from megatron.layers.base import Context, Layer, LayerInputs, State, input_names, inputs_of
from megatron.model.block import Block
from megatron.model.build import build_mixer
from megatron.model.config import ModelConfig
from megatron.model.embed import Embedding, Head
from megatron.model.lm import Backbone, embed, empty_states
from megatron.model.mlp import MLP
from megatron.ops.modules import has_hooks
from megatron.ops.opaque import values_visible
from megatron.ops.places import numbered


class DecoderLayer(GradientCheckpointingLayer, Block):
    """A residual block under transformers' gradient checkpointing."""


class DecoderPreTrainedModel(PreTrainedModel):
    """Base class of the exported models; a family sets `config_class`."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012 - transformers reads plain lists
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _is_stateful = True  # the state cannot be cropped: assisted decoding refuses such models

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """False: else transformers passes a key/value cache of its own."""
        return False

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise parameters that a folder lacks, or all of them under `from_config`, by the mixers' `init_rules`."""
        rules = module.init_rules() if isinstance(module, (Layer, MLP)) else {}
        fields = self.config.model_fields()
        std = fields.get("init_std", 0.02)
        roles = {name.removesuffix(".weight"): role for name, role in rules.items()}
        for name, child in module.named_modules() if rules else ():
            if isinstance(child, nn.Linear) and roles.get(name) in ("input", "output"):
                nn.init.normal_(child.weight, 0.0, std)
                if child.bias is not None:
                    nn.init.zeros_(child.bias)
        for name, p in module.named_parameters(recurse=False):
            role = rules.get(name)
            if role == "zeros" or name == "bias":
                nn.init.zeros_(p)
            elif role == "ones" or (role is None and p.dim() == 1):
                nn.init.ones_(p)
            elif role is not None or isinstance(module, Head) or p.dim() == 2:
                nn.init.normal_(p, 0.0, std)


class DecoderModel(DecoderPreTrainedModel):
    """Tokens to normalised hidden states: embedding, blocks and final norm, named as in training."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        shape = ModelConfig.from_dict(config.model_fields())
        backbone = Backbone(shape, [])
        self.embed_tokens: nn.Module = backbone.embed_tokens
        self.final_norm = backbone.final_norm
        self.layers = nn.ModuleList(DecoderLayer(shape, build_mixer(shape, i)) for i in range(shape.num_layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding; of a plain `nn.Embedding` only the table is used: ours has positions and scale too."""
        if type(value) is nn.Embedding:
            embedding = self._embedding()
            embedding.weight, embedding.num_embeddings = value.weight, value.num_embeddings
        else:
            self.embed_tokens = value

    def blocks(self) -> list[Block]:
        """The residual blocks, in order."""
        return [cast(Block, block) for block in self.layers]

    def mixers(self) -> list[Any]:
        """The token mixers, in order."""
        return [block.token_mixer for block in self.blocks()]

    def _embedding(self) -> Embedding:
        """The embedding, or its active copy inside a PEFT wrapper."""
        module = self.embed_tokens
        if isinstance(module, Embedding) or hasattr(module, "finish"):  # a wrapper that forwards to its active copy
            return cast(Embedding, module)
        return next(inner for inner in module.modules() if isinstance(inner, Embedding))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Any = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states [b, s, d] after the final norm.

        Args:
            input_ids: tokens [b, s]; or inputs_embeds [b, s, d].
            attention_mask: [b, seen + s] or [b, s], 1 for tokens and 0 for padding, at any position.
            position_ids: [b or 1, s]; a restart at 0 begins a document with an empty state. Otherwise they count up.
            past_key_values: a `RecurrentCache` of an earlier call, updated in place; an empty cache of another kind is ignored.
            cache: the same, under its name from transformers 5.24 on.
            use_cache: return a cache; default: the configuration's value, and False in training.
            output_attentions: return the weights [b, h, s, keys] of softmax layers, None for other layers.
            output_hidden_states: return the input of each block, and the final hidden states.
            cu_seq_lens_q: [documents + 1], offsets of documents in one flattened row.
            cu_seq_lens_k: must equal cu_seq_lens_q.
            seq_idx: document numbers [b or 1, s].
            kwargs: inputs that the model's mixers declare (`Layer.Inputs`, such as `prefix_length` and `prefix_mask` of JRT);
                tensors among them are [b, prompt].

        Raises:
            TypeError: an unknown argument.
            ValueError: a value that the model cannot honour.
        """
        check_tokens(input_ids, inputs_embeds)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        active = self._cache(resolve_cache(past_key_values, cache), use_cache, x)
        seen = 0 if active is None else active.seen
        mixer_values = {name: kwargs.pop(name) for name in self.input_names() if name in kwargs}
        check_unknown(kwargs, seen, x.shape[1])
        mask, tokens_before_x = check_mask(attention_mask, x, seen), tokens_before(attention_mask, x, seen)
        documents = Documents(position_ids, cu_seq_lens_q, cu_seq_lens_k, seq_idx).segment_ids(mask, x, seen, tokens_before_x)
        attention_list: list[Tensor] | None = [] if enabled(output_attentions, self.config, "output_attentions") else None
        ctx = Context(mask, documents, attentions=attention_list, inputs=self.inputs_of_pass(mixer_values, x, seen))
        hidden: list[Tensor] | None = [] if enabled(output_hidden_states, self.config, "output_hidden_states") else None
        self._check_positions(position_ids, ctx, active, x)
        move = compaction(mask, tokens_before_x)
        x, weights = self._pass(*((x, ctx) if move is None else (move.apply(x), ctx.map(move.apply))), active, hidden)
        if move is not None:
            x, hidden = move.undo(x), None if hidden is None else [move.undo(h) for h in hidden]
        returned_cache = active if use_cache or (use_cache is None and self._caches()) else None
        states = None if hidden is None else tuple(hidden)
        shown = None if weights is None else tuple(_in_call_order(w, move, seen) for w in weights)
        more: dict[str, Any] = {CACHE_FIELD: returned_cache, "hidden_states": states, "attentions": shown}
        output = DecoderModelOutput(x, **more)
        return output if enabled(return_dict, self.config, "return_dict") else output.to_tuple()

    def _caches(self) -> bool:
        return bool(self.config.use_cache) and not self.training

    def _cache(self, passed: RecurrentCache | None, use_cache: bool | None, x: Tensor) -> RecurrentCache | None:
        """The cache of this pass over x [b, s, d]; a new one gets empty states."""
        if passed is None and not (self._caches() if use_cache is None else use_cache):
            return None
        active = passed or RecurrentCache()
        if active.states is None:
            active.states = empty_states(self._embedding(), self.blocks(), len(x), x.dtype, x.device)
        if active.batch_size() != len(x):
            raise ValueError(f"the cache is of another batch size than the {len(x)} rows given")
        return active

    def input_names(self) -> list[str]:
        """Arguments of `forward` that the mixers of this model declare."""
        return input_names(self.mixers())

    def inputs_of_pass(self, values: Mapping[str, Any], x: Tensor, seen: int) -> tuple[LayerInputs, ...]:
        """The mixers' inputs for the pass over x [b, s, d] after `seen` tokens, from values by name for the complete text."""
        inputs = inputs_of(self.mixers(), values)
        return tuple(kind.map(lambda t: t.to(x.device)).of_pass(x.shape[0], seen, x.shape[1]) for kind in inputs)

    def two_way(self, values: Mapping[str, Any]) -> int:
        """Number of leading tokens that layers read in both directions (JRT's prefix), from the inputs of a call."""
        mixer_values = {name: values[name] for name in self.input_names() if name in values}
        ctx = Context(inputs=inputs_of(self.mixers(), mixer_values))
        return max((mixer.two_way(ctx) for mixer in self.mixers()), default=0)

    def _check_positions(self, position_ids: Tensor | None, ctx: Context, active: RecurrentCache | None, x: Tensor) -> None:
        """The model numbers learned positions itself; refuse other position_ids."""
        if self._embedding().positions is None or position_ids is None or not values_visible(x):
            return
        state = None if active is None or active.states is None else active.states[-1]["seen"]
        positions, _ = numbered(x.shape[0], x.shape[1], ctx.mask, ctx.segment_ids, state, x.device)
        shown = torch.ones_like(positions, dtype=torch.bool) if ctx.mask is None else ctx.mask
        if bool(((positions != position_ids.to(x.device)) & shown).any()):
            raise ValueError("this model numbers positions itself: tokens that are shown, from 0 in each row and document")

    def _pass(
        self, x: Tensor, ctx: Context, active: RecurrentCache | None, hidden: list[Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor | None, ...] | None]:
        """All blocks and the final norm over x [b, s, d]; fills `hidden` and the cache, returns attention weights per layer."""
        before = None if active is None else active.states
        x, tail = embed(self._embedding(), x, ctx, before)
        new: list[State] = []
        weights: list[Tensor | None] = []
        # the first token of a text goes through `forward`, which forms a prefix
        started = active is not None and active.seen > 0
        single = started and x.shape[1] == 1 and ctx.mask is None and not torch.is_grad_enabled()
        for i, block in enumerate(self.blocks()):
            if hidden is not None:
                hidden.append(x)
            if single and before is not None and not (has_hooks(block) or has_hooks(block.token_mixer)):
                y, state = block.step(x.squeeze(1), before[i], ctx)
                x = y.unsqueeze(1)
            else:
                x, state = block(x, ctx, None if before is None else before[i])
            if state is not None:
                new.append(state)
            if ctx.attentions is not None:
                weights.append(ctx.attentions.pop() if ctx.attentions else None)
        x = self.final_norm(x)
        if hidden is not None:
            hidden.append(x)
        if active is not None and active.states is not None:
            active.states, active.seen = new + tail, active.seen + x.shape[1]
        return x, tuple(weights) if ctx.attentions is not None else None


def _in_call_order(weights: Tensor | None, move: Compaction | None, seen: int) -> Tensor | None:
    """Attention weights [b, h, s, keys] in the token order of the call, without the empty slots of a new state."""
    if weights is None:
        return None
    current = weights if seen else weights[..., weights.shape[3] - weights.shape[2] :]
    return current if move is None else move.undo_weights(current)


def enabled(value: bool | None, config: PretrainedConfig, name: str) -> bool:
    """The value of a call, else of the configuration."""
    return bool(getattr(config, name, name == "return_dict") if value is None else value)
