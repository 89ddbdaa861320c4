"""Text generation, with the code of `generate.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, overload

from megatron.data.tokenizers import Tokenizer
from megatron.errors import ConfigError
from megatron.generation.sample import Sampling
from megatron.generation.text import Writer
from megatron.model.lm import LanguageModel


class Runnable(Protocol):
    """A model with its tokenizer: a `Checkpoint` or a `Trainer`."""

    @property
    def model(self) -> LanguageModel:
        """The model, in evaluation mode."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer."""

    @property
    def seq_length(self) -> int | None:
        """Sequence length of the training."""


def model_and_tokenizer(model: LanguageModel | Runnable, tokenizer: Tokenizer | None) -> tuple[LanguageModel, Tokenizer]:
    """The bare model and its tokenizer.

    Raises:
        ConfigError: there is no tokenizer.
    """
    module = model if isinstance(model, LanguageModel) else model.model
    tokenizer = tokenizer or (None if isinstance(model, LanguageModel) else model.tokenizer)
    if tokenizer is None:
        raise ConfigError("this model has no tokenizer", hint="tokenizer=load_tokenizer(...)")
    return module, tokenizer


@overload
def generate(model: LanguageModel | Runnable, prompts: str, **options: Any) -> str: ...
@overload
def generate(model: LanguageModel | Runnable, prompts: Sequence[str], **options: Any) -> list[str]: ...
def generate(
    model: LanguageModel | Runnable,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 64,
    tokenizer: Tokenizer | None = None,
    batch_size: int = 8,
    **sampling: Any,
) -> str | list[str]:
    """Continue texts. Greedy unless `temperature`, `top_k` or `top_p` is given.

    Args:
        model: a `Checkpoint`, a `Trainer`, or a `LanguageModel` together with `tokenizer`.
        prompts: one text or several; an empty one starts a new text.
        max_new_tokens: maximum number of new tokens per prompt.
        tokenizer: the model's tokenizer; a `Checkpoint` and a `Trainer` have one.
        batch_size: prompts per batch; results do not depend on it.
        **sampling: `temperature`, `top_k`, `top_p`, `seed`, `max_length`, `stop_tokens` and the other fields of
            `megatron.generation.sample.Sampling`.

    Returns:
        The new text of each prompt, without the prompt: a string for one prompt, a list for several.

    Raises:
        ConfigError: an option is unknown or out of range, or there is no tokenizer.
    """
    module, tokenizer = model_and_tokenizer(model, tokenizer)
    if not isinstance(model, LanguageModel):
        sampling.setdefault("max_length", model.seq_length)
    try:
        options = Sampling(maximum_tokens=max_new_tokens, **sampling)
    except TypeError as error:
        raise ConfigError("generate has an unknown option", why=str(error).partition("__init__() ")[2]) from None
    was_training = module.training
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    try:
        results = [record["text"] for record in Writer(module, tokenizer, options, batch_size).continue_texts(texts)]
    finally:
        module.train(was_training)
    return results[0] if isinstance(prompts, str) else results
