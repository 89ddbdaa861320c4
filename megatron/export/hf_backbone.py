"""The body of an exported model: `PreTrainedModel` around the trainer's embedding and blocks; tokens to hidden states.

It is packed into every exported folder, where `megatron/model` and the mixers stand above it in the same file. Nothing of the
mathematics is in it.
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
    """What all classes of the shell share; a family sets `config_class`."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012 - transformers reads plain lists
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _is_stateful = True  # the state cannot be rolled back by cutting it: assisted decoding refuses such models

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """False, else transformers hands in a key/value cache of its own."""
        return False

    def _init_weights(self, module: nn.Module) -> None:
        """Values for parameters that a folder lacks, or all of them under `from_config`: see the mixers' `init_rules`."""
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
    """Tokens to normed hidden states: embedding, blocks, final norm under the names they have in training."""

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
        """Replace the token embedding; a plain `nn.Embedding` gives its table to ours, which has positions and scale too."""
        if type(value) is nn.Embedding:
            own = self._embedding()
            own.weight, own.num_embeddings = value.weight, value.num_embeddings
        else:
            self.embed_tokens = value

    def blocks(self) -> list[Block]:
        """The residual blocks, in order."""
        return [cast(Block, block) for block in self.layers]

    def mixers(self) -> list[Any]:
        """The token mixers, in order."""
        return [block.token_mixer for block in self.blocks()]

    def _embedding(self) -> Embedding:
        """The embedding itself, or, inside what PEFT has put around it, the copy that is in use."""
        module = self.embed_tokens
        if isinstance(module, Embedding) or hasattr(module, "finish"):  # a wrapper that answers for the copy in use
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
            attention_mask: [b, seen + s] or [b, s], 1 for a token and 0 for padding, wherever it stands.
            position_ids: [b or 1, s]; a restart begins a document, whose state is empty. Otherwise they count on.
            past_key_values: a `RecurrentCache` of an earlier call, updated in place; an empty cache of another kind counts as
                none.
            cache: the same under its name since transformers 5.24.
            use_cache: return a cache; by default as the configuration says, and not in training.
            output_attentions: weights [b, h, s, keys] of softmax layers, None for layers that have none.
            output_hidden_states: what each block reads, and the final hidden states.
            cu_seq_lens_q: offsets of documents in one flattened row; cu_seq_lens_k must be the same.
            seq_idx: document numbers [b or 1, s].
            kwargs: inputs that the model's mixers declare (`Layer.Inputs`, such as `prefix_length` and `prefix_mask` of JRT);
                tensors among them are [b, prompt].

        Raises:
            TypeError: an unknown argument.
            ValueError: a value that would not be honoured.
        """
        check_tokens(input_ids, inputs_embeds)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        held = self._cache(resolve_cache(past_key_values, cache), use_cache, x)
        seen = 0 if held is None else held.seen
        own = {name: kwargs.pop(name) for name in self.input_names() if name in kwargs}
        check_unknown(kwargs, seen, x.shape[1])
        mask, before = check_mask(attention_mask, x, seen), tokens_before(attention_mask, x, seen)
        documents = Documents(position_ids, cu_seq_lens_q, cu_seq_lens_k, seq_idx).segment_ids(mask, x, seen, before)
        weighed: list[Tensor] | None = [] if asked(output_attentions, self.config, "output_attentions") else None
        ctx = Context(mask, documents, attentions=weighed, inputs=self.inputs_of_pass(own, x, seen))
        hidden: list[Tensor] | None = [] if asked(output_hidden_states, self.config, "output_hidden_states") else None
        self._check_places(position_ids, ctx, held, x)
        move = compaction(mask, before)
        x, weights = self._pass(*((x, ctx) if move is None else (move.apply(x), ctx.map(move.apply))), held, hidden)
        if move is not None:
            x, hidden = move.undo(x), None if hidden is None else [move.undo(h) for h in hidden]
        kept = held if use_cache or (use_cache is None and self._caches()) else None
        states = None if hidden is None else tuple(hidden)
        shown = None if weights is None else tuple(_as_given(w, move, seen) for w in weights)
        more: dict[str, Any] = {CACHE_FIELD: kept, "hidden_states": states, "attentions": shown}
        output = DecoderModelOutput(x, **more)
        return output if asked(return_dict, self.config, "return_dict") else output.to_tuple()

    def _caches(self) -> bool:
        return bool(self.config.use_cache) and not self.training

    def _cache(self, given: RecurrentCache | None, use_cache: bool | None, x: Tensor) -> RecurrentCache | None:
        """The cache of this pass over x [b, s, d], filled with empty states where it is new."""
        if given is None and not (self._caches() if use_cache is None else use_cache):
            return None
        held = given or RecurrentCache()
        if held.states is None:
            held.states = empty_states(self._embedding(), self.blocks(), len(x), x.dtype, x.device)
        if held.batch_size() != len(x):
            raise ValueError(f"the cache is of another batch size than the {len(x)} rows given")
        return held

    def input_names(self) -> list[str]:
        """Arguments of `forward` that the mixers of this model declare."""
        return input_names(self.mixers())

    def inputs_of_pass(self, values: Mapping[str, Any], x: Tensor, seen: int) -> tuple[LayerInputs, ...]:
        """The mixers' inputs, given by name for whole texts, for the pass over x [b, s, d] after `seen` tokens."""
        given = inputs_of(self.mixers(), values)
        return tuple(kind.map(lambda t: t.to(x.device)).of_pass(x.shape[0], seen, x.shape[1]) for kind in given)

    def two_way(self, values: Mapping[str, Any]) -> int:
        """Tokens at the start of a text that layers read in both directions (JRT's prefix), by the inputs of a call."""
        own = {name: values[name] for name in self.input_names() if name in values}
        ctx = Context(inputs=inputs_of(self.mixers(), own))
        return max((mixer.two_way(ctx) for mixer in self.mixers()), default=0)

    def _check_places(self, position_ids: Tensor | None, ctx: Context, held: RecurrentCache | None, x: Tensor) -> None:
        """Learned positions are numbered here; refuse position_ids that number otherwise."""
        if self._embedding().positions is None or position_ids is None or not values_visible(x):
            return
        state = None if held is None or held.states is None else held.states[-1]["seen"]
        places, _ = numbered(x.shape[0], x.shape[1], ctx.mask, ctx.segment_ids, state, x.device)
        shown = torch.ones_like(places, dtype=torch.bool) if ctx.mask is None else ctx.mask
        if bool(((places != position_ids.to(x.device)) & shown).any()):
            raise ValueError("this model numbers positions itself: tokens that are shown, from 0 in each row and document")

    def _pass(
        self, x: Tensor, ctx: Context, held: RecurrentCache | None, hidden: list[Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor | None, ...] | None]:
        """All blocks and the final norm over x [b, s, d]; fills `hidden` and the cache, returns attention weights per layer."""
        before = None if held is None else held.states
        x, tail = embed(self._embedding(), x, ctx, before)
        new: list[State] = []
        weights: list[Tensor | None] = []
        # the first token of all goes through `forward`, where a prefix is formed
        started = held is not None and held.seen > 0
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
        if held is not None and held.states is not None:
            held.states, held.seen = new + tail, held.seen + x.shape[1]
        return x, tuple(weights) if ctx.attentions is not None else None


def _as_given(weights: Tensor | None, move: Compaction | None, seen: int) -> Tensor | None:
    """Attention weights [b, h, s, keys] over the tokens as the call gave them, without a new state's empty places."""
    if weights is None:
        return None
    kept = weights if seen else weights[..., weights.shape[3] - weights.shape[2] :]
    return kept if move is None else move.undo_weights(kept)


def asked(value: bool | None, config: PretrainedConfig, name: str) -> bool:
    """What a call says, else what the configuration says."""
    return bool(getattr(config, name, name == "return_dict") if value is None else value)
