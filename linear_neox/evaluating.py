"""Evaluation: perplexity of a text, and recall on synthetic tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from linear_neox.generating import Runnable, model_and_tokenizer
from megatron.config.problems import Problems
from megatron.config.yaml_reader import read_files
from megatron.data.tokenizers import Tokenizer
from megatron.errors import ConfigError
from megatron.evaluation.perplexity import Score, score
from megatron.model.lm import LanguageModel
from megatron.synthetics.sweep import describe, points_of
from megatron.synthetics.train_point import run_point


def perplexity(
    model: LanguageModel | Runnable,
    data: str | Sequence[int] | NDArray[Any],
    *,
    length: int | None = None,
    stride: int | None = None,
    tokenizer: Tokenizer | None = None,
    backend: str = "auto",
) -> Score:
    """Score every token of a text once, as `eval.py --eval_tasks perplexity` does.

    Args:
        model: a `Checkpoint`, a `Trainer`, or a `LanguageModel` together with `tokenizer`.
        data: the text, or its token ids (`read_tokens` reads those of a corpus).
        length: maximum number of tokens per pass; None: the training sequence length.
        stride: tokens scored per pass (sliding window); None: `length`, without overlap.
        tokenizer: the model's tokenizer; a `Checkpoint` and a `Trainer` have one.
        backend: implementation of the operators: auto, reference, torch or triton.

    Returns:
        `.perplexity` per token, `.nll` (sum over all tokens, in nats), `.tokens`; `.report()` returns a dictionary.

    Raises:
        ConfigError: there is nothing to score, or the length is unknown.
        DataError: a token is outside the vocabulary.
    """
    module, tokenizer = model_and_tokenizer(model, tokenizer)
    length = length or (None if isinstance(model, LanguageModel) else model.seq_length)
    if length is None:
        raise ConfigError("the sequence length is unknown", hint="length=1024")
    tokens = np.asarray(tokenizer.tokenize(data) if isinstance(data, str) else data)
    was_training = module.training
    module.eval()
    try:
        stride = min(stride or length, length)
        return score(module, tokens, tokenizer.eod, length, stride, backend=backend, vocab_size=tokenizer.vocab_size)
    finally:
        module.train(was_training)


def recall_sweep(
    sweep: str | Path | Mapping[str, Any], *, on_result: Callable[[str], None] | None = print
) -> list[dict[str, Any]]:
    """Train small models on a synthetic task from scratch and measure their recall, sequentially in this process.

    `tools/synthetics.py` runs the same points in several processes and can resume.

    Args:
        sweep: a YAML such as `configs/synthetics/mqar-cpu.yml`, or its content as a mapping: `data`, `model`, `training`
            and `families` (docs/synthetics.md).
        on_result: called with a line of text after each point; None: no output.

    Returns:
        One dictionary per point: `name`, `accuracy`, `slices`, `parameters`, `state_bytes`, `history` and its settings.

    Raises:
        ConfigError: the sweep is invalid.
    """
    if not isinstance(sweep, Mapping):
        problems = Problems()
        source = read_files([sweep], None, problems)
        problems.raise_if_any()
        sweep = source.values
    results = []
    for point in points_of(sweep):
        results.append(run_point(point))
        if on_result is not None:
            on_result(f"{describe(point)}: accuracy {results[-1]['accuracy']:.3f} in {results[-1]['seconds']:.0f} s")
    return results
