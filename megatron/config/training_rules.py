"""Cross rules of the objective, the split of the data, and how the model is cut over ranks; see `rules.py`.

Whatever they refuse would else be refused after data, ranks or devices had been waited for.
"""

from __future__ import annotations

import re

from megatron import registry
from megatron.config.pattern import PatternError
from megatron.config.rule import Rule
from megatron.config.schema import RunConfig
from megatron.data.shares import split_shares
from megatron.errors import DataError


def _mixers(run: RunConfig) -> dict[str, registry.LayerInfo]:
    """Name in `attention_config` -> mixer, of those that exist; the others are reported elsewhere."""
    try:
        types = dict.fromkeys(run.model.layer_types)
    except PatternError:
        return {}
    return {name: registry.layer_info(name) for name in types if name in registry.layer_names()}


def _two_way(run: RunConfig) -> int:
    """Tokens that prefix layers of the model read in both directions."""
    return int(run.layers.get("jrt", {}).get("prefix_length", 0)) if "jrt" in _mixers(run) else 0


def _prefix(run: RunConfig) -> int:
    """Tokens of the prefix that the objective leaves out or masks; 0 for a causal one."""
    causal = run.training.objective == "causal"
    return 0 if causal else run.training.objective_prefix_length or _two_way(run)


def _split_problem(run: RunConfig) -> str:
    try:
        split_shares(run.data.split)
    except DataError as error:
        return f"{error.what}: {error.why}"
    return ""


def _partition_problem(run: RunConfig) -> str:
    """What is wrong with `pipe_partition_method`; the names that a regular expression may match are those of the mixers."""
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
    """What stands against `loss_chunk_tokens`."""
    if not run.training.loss_chunk_tokens:
        return ""
    if run.parallel.zero_stage == 3:
        return "ZeRO-3 gathers the output projection for its own forward only"
    return "a synthetic task counts right answers in the logits" if run.data.synthetic is not None else ""


def _sequence_problem(run: RunConfig) -> str:
    """What stands against `sequence_parallel` that needs no model to be seen."""
    ranks = run.parallel.tensor_ranks
    if not run.parallel.sequence_parallel or ranks == 1:
        return ""
    if run.model.seq_length % ranks:
        return f"seq_length {run.model.seq_length} is not a multiple of model_parallel_size {ranks}"
    if run.model.hidden_dropout > 0:
        return "hidden_dropout would not drop the same activations as without it"
    return "learned positions are added to the whole sequence" if run.model.pos_emb == "learned" else ""


TRAINING_RULES: tuple[Rule, ...] = (
    Rule(
        ("split",),
        lambda r: bool(_split_problem(r)),
        _split_problem,
        'for example split: "969, 30, 1"',
    ),
    Rule(
        ("pipe_partition_method",),
        lambda r: bool(_partition_problem(r)),
        _partition_problem,
        "type:REGEX (type:transformer|mlp takes every block), uniform or parameters",
    ),
    Rule(
        ("loss_chunk_tokens",),
        lambda r: bool(_chunked_loss_problem(r)),
        lambda r: f"loss_chunk_tokens cannot be used here: {_chunked_loss_problem(r)}",
        "loss_chunk_tokens: 0",
    ),
    Rule(
        ("sequence_parallel",),
        lambda r: bool(_sequence_problem(r)),
        lambda r: f"sequence_parallel cannot be exact here: {_sequence_problem(r)}",
        "sequence_parallel: false",
    ),
    Rule(
        ("objective", "jrt_prefix_length"),
        lambda r: r.training.objective == "causal" and _two_way(r) > 0,
        lambda r: (
            f"objective causal with jrt layers that see the first {_two_way(r)} tokens in both directions:"
            " the model would be trained to predict tokens that it sees"
        ),
        "objective: jrt (masked tokens in the prefix) or objective: prefix",
    ),
    Rule(
        ("objective_prefix_length", "jrt_prefix_length"),
        lambda r: _two_way(r) > 0 and _prefix(r) not in (0, _two_way(r)),
        lambda r: f"objective_prefix_length {_prefix(r)} is not jrt_prefix_length {_two_way(r)}",
        "leave objective_prefix_length out and it follows",
    ),
    Rule(
        ("objective",),
        lambda r: r.training.objective != "causal" and _prefix(r) < 1,
        lambda r: f"objective '{r.training.objective}' needs a prefix",
        "set objective_prefix_length or jrt_prefix_length",
    ),
    Rule(
        ("objective_prefix_length", "jrt_prefix_length", "seq_length"),
        lambda r: 0 < r.model.seq_length <= _prefix(r),
        lambda r: f"a prefix of {_prefix(r)} tokens leaves nothing of seq_length {r.model.seq_length} to predict",
        "raise seq_length, or shorten the prefix",
    ),
    Rule(
        ("objective_mask_token", "padded_vocab_size"),
        lambda r: 0 < (r.tokenizer.padded_vocab_size or 0) <= (r.training.objective_mask_token or 0),
        lambda r: (
            f"objective_mask_token {r.training.objective_mask_token} is outside the vocabulary of"
            f" {r.tokenizer.padded_vocab_size} rows"
        ),
        "leave it out: the last row stands for a hidden token",
    ),
)
