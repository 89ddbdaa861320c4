"""Cross rules of the objective, the split of the data, and how the model is sharded over ranks; see `rules.py`.

Without them the same would be refused only after data, ranks or devices are ready.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron import registry
from megatron.config.pattern import PatternError
from megatron.config.problems import Violation
from megatron.config.schema import RunConfig
from megatron.data.shares import split_shares
from megatron.errors import ConfigError, DataError
from megatron.parallel.context_lengths import check_context_length


def sharding(run: RunConfig) -> Iterator[Violation]:
    """The split of the data, pipeline partition, chunked loss and sequence parallelism."""
    try:
        split_shares(run.data.split)
    except DataError as error:
        yield Violation(("split",), f"{error.what}: {error.why}", 'for example split: "969, 30, 1"')
    if problem := _partition_problem(run):
        hint = "type:REGEX (type:transformer|mlp takes every block), uniform or parameters"
        yield Violation(("pipe_partition_method",), problem, hint)
    if problem := _chunked_loss_problem(run):
        yield Violation(("loss_chunk_tokens",), f"loss_chunk_tokens cannot be used here: {problem}", "loss_chunk_tokens: 0")
    yield from _context(run)
    if problem := _sequence_problem(run):
        yield Violation(
            ("sequence_parallel",), f"sequence_parallel cannot be exact here: {problem}", "sequence_parallel: false"
        )


def objective(run: RunConfig) -> Iterator[Violation]:
    """The objective and the prefix that layers read in both directions."""
    t, vocabulary = run.training, run.tokenizer.padded_vocab_size or 0
    both_ways = int(run.layers.get("jrt", {}).get("prefix_length", 0)) if "jrt" in _mixers(run) else 0
    prefix = 0 if t.objective == "causal" else t.objective_prefix_length or both_ways
    if t.objective == "causal" and both_ways > 0:
        message = (
            f"objective causal with jrt layers that see the first {both_ways} tokens in both directions:"
            " the model would be trained to predict tokens that it sees"
        )
        hint = "objective: jrt (masked tokens in the prefix) or objective: prefix"
        yield Violation(("objective", "jrt_prefix_length"), message, hint)
    if both_ways > 0 and prefix not in (0, both_ways):
        message = f"objective_prefix_length {prefix} is not jrt_prefix_length {both_ways}"
        yield Violation(
            ("objective_prefix_length", "jrt_prefix_length"), message, "leave objective_prefix_length out and it follows"
        )
    if t.objective != "causal" and prefix < 1:
        hint = "set objective_prefix_length or jrt_prefix_length"
        yield Violation(("objective",), f"objective '{t.objective}' needs a prefix", hint)
    if 0 < run.model.seq_length <= prefix:
        message = f"a prefix of {prefix} tokens leaves nothing of seq_length {run.model.seq_length} to predict"
        hint = "raise seq_length, or shorten the prefix"
        yield Violation(("objective_prefix_length", "jrt_prefix_length", "seq_length"), message, hint)
    if 0 < vocabulary <= (t.objective_mask_token or 0):
        message = f"objective_mask_token {t.objective_mask_token} is outside the vocabulary of {vocabulary} rows"
        hint = "leave it out: the last row stands for a masked token"
        yield Violation(("objective_mask_token", "padded_vocab_size"), message, hint)


def _mixers(run: RunConfig) -> dict[str, registry.LayerInfo]:
    """Name in `attention_config` -> mixer, of those that exist; the others are reported elsewhere."""
    try:
        types = dict.fromkeys(run.model.layer_types)
    except PatternError:
        return {}
    return {name: registry.layer_info(name) for name in types if name in registry.layer_names()}


def _partition_problem(run: RunConfig) -> str:
    """What is wrong with `pipe_partition_method`; its regular expression matches names of mixers."""
    method = run.parallel.pipe_partition_method
    word = method.lower()
    if word in ("uniform", "parameters", "type:transformer|mlp"):
        return ""
    if not word.startswith("type:"):
        return f"unknown pipe_partition_method '{method}'"
    try:
        pattern = re.compile(method[5:], re.IGNORECASE)
    except (re.error, RecursionError, OverflowError) as error:
        return f"pipe_partition_method '{method}' is not a regular expression: {error}"
    mixers = _mixers(run)
    names = {"BlockStage", *mixers, *(info.class_name for info in mixers.values())}
    return "" if any(map(pattern.search, names)) else f"pipe_partition_method '{method}' matches no layer"


def _chunked_loss_problem(run: RunConfig) -> str:
    """Why `loss_chunk_tokens` cannot be used; empty if it can."""
    if not run.training.loss_chunk_tokens:
        return ""
    if run.parallel.zero_stage == 3:
        return "ZeRO-3 gathers the output projection for its own forward only"
    return "a synthetic task counts right answers in the logits" if run.data.synthetic is not None else ""


def _context(run: RunConfig) -> Iterator[Violation]:
    """Context parallelism, as far as it is known without a model; `check_context_parallel` has the rest."""
    size, length = run.parallel.context_parallel_size, run.model.seq_length
    if size == 1:
        return
    tensor = run.parallel.tensor_ranks if run.parallel.sequence_parallel else 1
    try:
        check_context_length(length, size, tensor)
    except ConfigError as error:
        yield Violation(("seq_length", "context_parallel_size"), error.what, error.hint or "")
    for name, info in _mixers(run).items():
        if not info.context_parallel:
            message = f"context_parallel_size {size}: layers '{name}' cannot read shards of a sequence"
            hint = "context_parallel_size: 1, or mixers of " + ", ".join(registry.context_parallel_names())
            yield Violation(("context_parallel_size", "attention_config"), message, hint)


def _sequence_problem(run: RunConfig) -> str:
    """Why `sequence_parallel` cannot be used, as far as this is known without a model; empty if it can."""
    ranks = run.parallel.tensor_ranks
    if not run.parallel.sequence_parallel or ranks == 1:
        return ""
    if run.model.seq_length % ranks and run.parallel.context_parallel_size == 1:
        return f"seq_length {run.model.seq_length} is not a multiple of model_parallel_size {ranks}"
    if run.model.hidden_dropout > 0:
        return "hidden_dropout would not drop the same activations as without it"
    return "learned positions are added to the whole sequence" if run.model.pos_emb == "learned" else ""
