"""The shell that makes our model a Hugging Face one: cache, masks, loss and `generate` around the trainer's own blocks.

It is imported here (verification) and packed into every exported folder, where `megatron/model` and the mixers stand above it
in the same file. Nothing of the mathematics is in it. Written for transformers 5.x; what that asks for is marked below.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from megatron.layers.base import Context, Layer, State
from megatron.model.block import Block
from megatron.model.build import build_mixer
from megatron.model.config import ModelConfig
from megatron.model.embed import Embedding, Head
from megatron.model.lm import Backbone, embed, empty_states
from megatron.model.loss import token_loss
from megatron.model.mlp import MLP


class RecurrentCache:
    """What `generate` carries from step to step: one state per layer (a dict of tensors, batch on dim 0).

    Its size does not grow with the text, except for the layers that keep keys and values. A forward pass replaces the tensors
    and never writes into them, so that a shallow copy (`fork`) is a checkpoint of the conversation.
    """

    is_compileable = False

    def __init__(self, states: list[State], seen: int = 0) -> None:
        self.states, self.seen = states, seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens per row that the states have read, padding included."""
        return self.seen

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: no bound."""
        return -1

    def fork(self) -> RecurrentCache:
        """A second cache that continues from here on its own."""
        return RecurrentCache([dict(state) for state in self.states], self.seen)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i becomes the old row `beam_idx[i]`, in every tensor of every layer."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in that order."""
        self.states = [{n: t.index_select(0, indices.to(t.device)) for n, t in s.items()} for s in self.states]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, neighbours staying together."""
        self.states = [{n: t.repeat_interleave(repeats, 0) for n, t in s.items()} for s in self.states]


class DecoderPreTrainedModel(PreTrainedModel):
    """What all classes of the shell share; a family sets `config_class`."""

    base_model_prefix = "model"
    _no_split_modules = ["Block"]  # noqa: RUF012 - transformers reads a plain list
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
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
        backbone = Backbone(shape, [build_mixer(shape, i) for i in range(shape.num_layers)])
        self.embed_tokens, self.layers, self.final_norm = backbone.embed_tokens, backbone.layers, backbone.final_norm
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the token embedding, or only its table where transformers hands in one of its own (a resized vocabulary)."""
        if isinstance(value, Embedding):
            self.embed_tokens = value
        else:
            self.embed_tokens.weight, self.embed_tokens.rows = value.weight, value.weight.shape[0]

    def blocks(self) -> list[Block]:
        """The residual blocks, in order."""
        return [cast(Block, block) for block in self.layers]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        prefix_length: int | None = None,
        prefix_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states [b, s, d] after the final norm.

        attention_mask [b, seen + s] or [b, s], 1 for a token: padding on the left changes nothing; padding on the right leaves
        the states of rows as their last real token left them. past_key_values: a `RecurrentCache` of an earlier call, updated
        in place; an empty cache of another kind counts as none. prefix_length, prefix_mask [b, prompt]: for JRT layers, see
        `Context`; the mask counts in the pass that reads the prompt.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        cache = _own_cache(past_key_values)
        if cache is None and use_cache:
            cache = RecurrentCache(empty_states(self.embed_tokens, self.blocks(), len(x), x.dtype, x.device))
        if cache is not None and len(next(iter(cache.states[0].values()))) != len(x):
            raise ValueError(f"the cache is of another batch size than the {len(x)} rows given")
        filler = _filler_mask(prefix_mask, x, cache)
        ctx = Context(mask=_padding_mask(attention_mask, x), prefix_length=prefix_length, prefix_mask=filler)
        seen: list[Tensor] | None = [] if output_hidden_states else None
        before = None if cache is None else cache.states
        x, tail = embed(self.embed_tokens, x, ctx, before)
        x, states = self._run(x, ctx, before, seen)
        x = self.final_norm(x)
        if seen is not None:
            seen.append(x)
        if cache is not None and states is not None:
            states = states + tail
            cache.states, cache.seen = states, cache.seen + x.shape[1]
        kept: Any = cache if use_cache else None
        output = BaseModelOutputWithPast(x, kept, tuple(seen) if seen is not None else None)
        return output if return_dict is not False else output.to_tuple()

    def _run(
        self, x: Tensor, ctx: Context, states: list[State] | None, seen: list[Tensor] | None
    ) -> tuple[Tensor, list[State] | None]:
        """All blocks on x [b, s, d]; one token without padding takes the blocks' decode step."""
        single = states is not None and x.shape[1] == 1 and ctx.mask is None and not torch.is_grad_enabled()
        new = []
        for i, block in enumerate(self.blocks()):
            if seen is not None:
                seen.append(x)
            if single and states is not None:
                y, state = block.step(x.squeeze(1), states[i], ctx)
                x = y.unsqueeze(1)
            else:
                x, state = block(x, ctx, None if states is None else states[i])
            new.append(state)
        return x, None if states is None else new


class DecoderForCausalLM(DecoderPreTrainedModel, GenerationMixin):
    """The language model: `DecoderModel` and the output matrix. `generate` is transformers' own."""

    backbone_class: ClassVar[type[DecoderModel]] = DecoderModel
    # a dictionary since transformers 5: tied name -> its source; in force when config.tie_word_embeddings is
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.model = self.backbone_class(config)
        embedding = self.model.embed_tokens
        rows, size = embedding.weight.shape
        self.lm_head = Head(rows, size, embedding if config.tie_word_embeddings else None)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the token embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The output matrix."""
        return self.lm_head

    def set_output_embeddings(self, value: Any) -> None:
        """Replace the output matrix."""
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        prefix_length: int | None = None,
        prefix_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits [b, s, n], or of the last `logits_to_keep` positions.

        labels [b, s]: the tokens themselves (they are shifted here), -100 where no loss is wanted. The loss is their mean
        cross entropy in fp32, or the sum over `num_items_in_batch` when the trainer gives that.
        """
        inner = self.model(
            input_ids,
            attention_mask,
            past_key_values,
            inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            prefix_length=prefix_length,
            prefix_mask=prefix_mask,
        )
        hidden = inner.last_hidden_state
        if not isinstance(logits_to_keep, int):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            following = labels[:, 1:].to(logits.device)
            loss = token_loss(logits[:, :-1], following)
            if num_items_in_batch is not None:
                loss = loss * (following != -100).sum() / num_items_in_batch
        output = CausalLMOutputWithPast(loss, logits, inner.past_key_values, inner.hidden_states)
        return output if return_dict is not False else output.to_tuple()


def _own_cache(cache: Any) -> RecurrentCache | None:
    """The cache if it is ours; an empty foreign one is none; a foreign one with content cannot be continued."""
    if isinstance(cache, RecurrentCache):
        return cache
    length = getattr(cache, "get_seq_length", None)
    if cache is None or (length() == 0 if length is not None else not cache):
        return None
    raise ValueError(f"a {type(cache).__name__} holds no recurrent state; pass the past_key_values that this model returned")


def _filler_mask(prefix_mask: Tensor | None, x: Tensor, cache: RecurrentCache | None) -> Tensor | None:
    """JRT's filler in front of the prompt; of no meaning in passes after the one that read the prompt."""
    if prefix_mask is None or (cache is not None and cache.seen):
        return None
    if prefix_mask.shape != x.shape[:2]:
        raise ValueError(f"prefix_mask must be {tuple(x.shape[:2])}, got {tuple(prefix_mask.shape)}")
    return prefix_mask.to(x.device)


def _padding_mask(attention_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The part [b, s] of a 0/1 mask that belongs to x [b, s, d]; None when it hides nothing, which is the faster case."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] < x.shape[1]:
        raise ValueError(f"attention_mask must be [batch, length], got {tuple(attention_mask.shape)} for x {tuple(x.shape)}")
    mask = attention_mask[:, -x.shape[1] :].to(x.device)
    if mask.device.type != "meta" and not torch.compiler.is_compiling() and bool(mask.all()):
        return None
    return mask
