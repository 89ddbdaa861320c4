"""Text from a model, with what `generate.py` uses."""

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
        """In evaluation mode."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of its data."""

    @property
    def seq_length(self) -> int | None:
        """Tokens of a sample in training."""


def parts_of(model: LanguageModel | Runnable, tokenizer: Tokenizer | None) -> tuple[LanguageModel, Tokenizer]:
    """The model and its tokenizer.

    Raises:
        ConfigError: no tokenizer is known.
    """
    bare = model if isinstance(model, LanguageModel) else model.model
    known = tokenizer or (None if isinstance(model, LanguageModel) else model.tokenizer)
    if known is None:
        raise ConfigError("no tokenizer is known for this model", hint="tokenizer=load_tokenizer(...)")
    return bare, known


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
        prompts: one text or several; an empty one starts from nothing.
        max_new_tokens: tokens at most per prompt.
        tokenizer: of the model's data; a `Checkpoint` and a `Trainer` have theirs.
        batch_size: prompts that run together; results do not depend on it.
        **sampling: `temperature`, `top_k`, `top_p`, `seed`, `max_length`, `stop_tokens` and the other fields of
            `megatron.generation.sample.Sampling`.

    Returns:
        The new text of each prompt, without the prompt: a string for one prompt, a list for several.

    Raises:
        ConfigError: an option is unknown or out of range, or no tokenizer is known.
    """
    bare, known = parts_of(model, tokenizer)
    if not isinstance(model, LanguageModel):
        sampling.setdefault("max_length", model.seq_length)
    try:
        how = Sampling(maximum_tokens=max_new_tokens, **sampling)
    except TypeError as error:
        raise ConfigError("generate does not know an option", why=str(error).partition("__init__() ")[2]) from None
    was_training = bare.training
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    try:
        results = [record["text"] for record in Writer(bare, known, how, batch_size).continue_texts(texts)]
    finally:
        bare.train(was_training)
    return results[0] if isinstance(prompts, str) else results
