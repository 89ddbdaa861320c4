"""The shell that makes our model a Hugging Face one: cache, masks, documents, loss and `generate` around the trainer's blocks.

It is imported here (verification) and packed into every exported folder, where `megatron/model` and the mixers stand above it
in the same file. Nothing of the mathematics is in it. Written for the range of transformers in `interop/tested_versions.py`: up
to 5.23 the cache is called `past_key_values`, from 5.24 on `cache`, as an argument and as a field of the output; both names
work with every version.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig

from megatron.export.hf_backbone import DecoderModel, DecoderPreTrainedModel, asked
from megatron.export.hf_cache import RecurrentCache, resolve_cache
from megatron.export.hf_inputs import check_generation
from megatron.export.hf_outputs import CACHE_ARGUMENT, CACHE_FIELD, DecoderLMOutput
from megatron.export.hf_register import register_causal_lm
from megatron.model.embed import Head
from megatron.model.loss import token_loss
from megatron.ops.opaque import values_visible


class DecoderForCausalLM(DecoderPreTrainedModel, GenerationMixin):
    """The language model: `DecoderModel` and the output projection. `generate` is transformers' own."""

    backbone_class: ClassVar[type[DecoderModel]] = DecoderModel
    accepts_loss_kwargs = True  # num_items_in_batch
    # a dictionary since transformers 5: tied name -> its source; in force when config.tie_word_embeddings is
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.model = self.backbone_class(config)
        embedding = self.model._embedding()
        tied = embedding if config.tie_word_embeddings else None
        self.lm_head = Head(embedding.num_embeddings, embedding.embedding_dim, tied)
        self.post_init()
        modules = (pair for mixer in self.model.mixers() for pair in mixer.named_modules())
        linears = {name for name, module in modules if isinstance(module, nn.Linear)}
        register_causal_lm(config.model_type, type(self).__name__, linears)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The output projection."""
        return self.lm_head

    def set_output_embeddings(self, value: Any) -> None:
        """Replace the output projection."""
        self.lm_head = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As transformers does it, but with new parameters: it exchanges the memory of the old ones, and graphs that are still
        alive know them by their old size.
        """
        resized = super().resize_token_embeddings(*args, **kwargs)
        for module in (resized, self.lm_head):
            module.weight = nn.Parameter(module.weight.detach(), module.weight.requires_grad)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = resized.weight
        return resized

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> Any:
        """Start from a cache of ours where a prompt is read in pieces (`prefill_chunk_size`); else `forward` makes it.

        The first piece holds the whole prefix of prefix layers (JRT), which is formed in one pass.
        """
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]
        prompt = getattr(generation_config, "_mask_length", None)
        check_generation(model_kwargs, resolve_cache(model_kwargs.get(CACHE_ARGUMENT), None), prompt)
        if getattr(generation_config, "is_assistant", False):
            RecurrentCache().activate_past_recording()
        if not generation_config.prefill_chunk_size:
            return
        if generation_config.use_cache and model_kwargs.get(CACHE_ARGUMENT) is None:
            model_kwargs[CACHE_ARGUMENT] = RecurrentCache()
        two_way, mask = self.model.two_way(model_kwargs), model_kwargs.get("attention_mask")
        if two_way:
            padding = 0 if mask is None else int((mask == 0).sum(1).max())
            generation_config.prefill_chunk_size = max(generation_config.prefill_chunk_size, two_way + padding)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """As transformers does, which knows arguments by `forward`'s signature; those that mixers declare are known as well."""
        own = self.model.input_names()
        other = {name: value for name, value in model_kwargs.items() if name not in own}
        super()._validate_model_kwargs(other)  # type: ignore[misc]

    def prepare_inputs_for_generation(self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any) -> Any:
        """As transformers does it, with the cache under its old name: by it PEFT knows a first step, and puts learned prompts
        in front of every other step where it does not find it.
        """
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if inputs.get("cache") is not None:
            inputs["past_key_values"] = inputs.pop("cache")
        return inputs

    def floating_point_ops(self, input_dict: dict[str, Any], exclude_embeddings: bool = True) -> int:
        """FLOPs of a training step on `input_ids` [b, s], as Trainer logs them: forward and twice that for the backward."""
        rows, length = input_dict["input_ids"].shape
        mixers = sum(mixer.flops(length) for mixer in self.model.mixers())
        matrices = sum(
            p.numel() for b in self.model.blocks() if b.channel_mixer is not None for p in b.channel_mixer.parameters()
        )
        head = 0 if exclude_embeddings else self.config.vocab_size * self.config.hidden_size
        return int(3 * rows * length * (mixers + 2 * (matrices + head)))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        cache: Any = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits [b, s, n]. Arguments that are not listed here are those of `DecoderModel.forward`.

        Args:
            labels: [b, s], the tokens themselves (they are shifted here), -100 where no loss is wanted. The loss is their mean
                cross entropy in fp32, 0 where none counts.
            num_items_in_batch: the loss is the sum divided by this, as Trainer wants it under gradient accumulation.
            logits_to_keep: logits of the last so many positions, or of the positions listed; 0 for all.
        """
        inner = self.model(
            input_ids,
            attention_mask,
            position_ids,
            resolve_cache(past_key_values, cache),
            inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            seq_idx=seq_idx,
            **kwargs,
        )
        hidden = inner.last_hidden_state
        if not isinstance(logits_to_keep, int):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.lm_head(hidden)
        loss = None if labels is None else self._loss(logits, labels, attention_mask, num_items_in_batch, kwargs)
        more = {CACHE_FIELD: getattr(inner, CACHE_FIELD), "hidden_states": inner.hidden_states}
        output = DecoderLMOutput(loss, logits, **more, attentions=inner.attentions)
        return output if asked(return_dict, self.config, "return_dict") else output.to_tuple()

    def _loss(
        self, logits: Tensor, labels: Tensor, mask: Tensor | None, count: Tensor | int | None, inputs: dict[str, Any]
    ) -> Tensor:
        """Cross entropy of logits [b, s, n] with the labels [b, s] one place on: mean, or sum / count.

        What stands behind padding is predicted from nothing and does not count.
        """
        if labels.shape != logits.shape[:2]:
            raise ValueError(f"labels must be {tuple(logits.shape[:2])} as the logits, got {tuple(labels.shape)}")
        following = labels[:, 1:].to(logits.device)
        if mask is not None:
            shown = mask[:, -labels.shape[1] : -1].to(logits.device) != 0
            following = following.masked_fill(~shown, -100)
        if values_visible(following):
            wrong = (following != -100) & ((following < 0) | (following >= logits.shape[-1]))
            if following.is_floating_point() or bool(wrong.any()):
                raise ValueError(f"labels must be token ids of the {logits.shape[-1]} in the vocabulary, or -100")
            two_way = self.model.two_way(inputs)
            if two_way and bool((following[:, : two_way - 1] != -100).any()):
                warnings.warn(_SEEN_LABELS.format(two_way), stacklevel=2)
        loss = token_loss(logits[:, :-1], following)
        if count is None:
            return loss
        return loss * (following != -100).sum() / (count.to(loss.device) if isinstance(count, Tensor) else count)


_SEEN_LABELS = (
    "labels inside the prefix of {} tokens, which prefix layers (JRT) read in both directions: the model sees what it is to "
    "predict, and its loss there is copying. Set these labels to -100, or give prefix_length=0 to train it left to right"
)
