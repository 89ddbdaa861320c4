"""How good a model is: perplexity of a text, and recall on synthetic tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from linear_neox.generating import Runnable, parts_of
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
        length: tokens that a pass reads at most; None is the length of training.
        stride: tokens scored per pass (sliding evaluation); None is `length`: passes do not overlap.
        tokenizer: of the model's data; a `Checkpoint` and a `Trainer` have theirs.
        backend: path of the operators: auto, reference, torch or triton.

    Returns:
        `.perplexity` per token, `.nll` in nats over all tokens, `.tokens`; `.report()` as a dictionary.

    Raises:
        ConfigError: there is nothing to score, or the length is not known.
        DataError: a token is outside the vocabulary.
    """
    bare, known = parts_of(model, tokenizer)
    length = length or (None if isinstance(model, LanguageModel) else model.seq_length)
    if length is None:
        raise ConfigError("no length is known to read the text in", hint="length=1024")
    tokens = np.asarray(known.tokenize(data) if isinstance(data, str) else data)
    was_training = bare.training
    bare.eval()
    try:
        chosen = min(stride or length, length)
        return score(bare, tokens, known.eod, length, chosen, backend=backend, vocab_size=known.vocab_size)
    finally:
        bare.train(was_training)


def recall_sweep(
    sweep: str | Path | Mapping[str, Any], *, on_result: Callable[[str], None] | None = print
) -> list[dict[str, Any]]:
    """Train small models on a synthetic task from nothing and measure what each recalls, one after the other, in this process.

    `tools/synthetics.py` runs the same points over several processes and keeps what is finished.

    Args:
        sweep: a YAML such as `configs/synthetics/mqar-cpu.yml`, or the mapping that stands in one: `data`, `model`, `training`
            and `families` (docs/synthetics.md).
        on_result: called with a line of text after each point; None for silence.

    Returns:
        One dictionary per point: `name`, `accuracy`, `slices`, `parameters`, `state_bytes`, `history` and what was asked for.

    Raises:
        ConfigError: it describes no sweep.
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
