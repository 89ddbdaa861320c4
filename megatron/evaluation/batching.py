"""Batches lm-eval's requests such that a score does not depend on the other rows of its batch.

Scoring pads on the right, which no causal mixer can see; rows of models with prefix layers (`jrt`) share a batch
only if their prefixes have equal length, so a prefix never contains padding. Generation pads on the left with a mask that every
mixer honours exactly. Requests with the same input tokens (one-token choices of a question) share a row.

`options.Prefix` defines the prefix of a prefix model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from megatron.evaluation.forward import ForwardBatch
from megatron.evaluation.options import Prefix
from megatron.generation.prompts import fill_prompt, filler_mask, left_pad


@dataclass
class ScoreRow:
    """One row of tokens and the targets scored on it.

    Attributes:
        tokens: input ids.
        prefix: prefix length, None for a model without prefix layers.
        hidden: number of masked fill tokens at the start.
        spans: (request number, index of the first target, target ids).
    """

    tokens: list[int]
    prefix: int | None
    hidden: int
    spans: list[tuple[int, int, list[int]]] = field(default_factory=list)


def score_row(context: Sequence[int], targets: Sequence[int], max_length: int, prefix: Prefix) -> ScoreRow:
    """The row that scores `targets` after `context`, truncated on the left; its request number is 0.

    Args:
        context: ids of the context, at least one.
        targets: ids to score.
        max_length: maximum number of input tokens.
        prefix: prefix of the model.
    """
    text = [*context, *targets][-(max_length + 1) :]
    targets = list(targets)[-(len(text) - 1) :]
    split, hidden, reach = len(text) - len(targets), 0, None
    if prefix.length and prefix.scope == "context":
        filled, hidden = fill_prompt(text[:split], prefix.mode, prefix.length, prefix.filler)
        text, split, reach = filled + text[split:], len(filled), min(prefix.length, len(filled))
    elif prefix.length:
        filled, hidden = fill_prompt(text, prefix.mode, prefix.length, prefix.filler)
        split += len(filled) - len(text)
        text, reach = filled, min(prefix.length, len(filled) - 1)
    return ScoreRow(text[:-1], reach, hidden, [(0, split - 1, targets)])


def share_rows(rows: Sequence[ScoreRow]) -> list[ScoreRow]:
    """Merge rows with equal inputs; request i is `rows[i]`."""
    distinct: dict[tuple[object, ...], ScoreRow] = {}
    for number, row in enumerate(rows):
        key = (row.prefix, row.hidden, *row.tokens)
        shared = distinct.setdefault(key, ScoreRow(row.tokens, row.prefix, row.hidden))
        shared.spans += [(number, first, targets) for _, first, targets in row.spans]
    return list(distinct.values())


def score_batches(rows: Sequence[ScoreRow], size: int) -> Iterator[list[ScoreRow]]:
    """Batches of at most `size` rows with equal prefix length, longest rows first."""

    def order(row: ScoreRow) -> tuple[int, int, int]:
        return (-1 if row.prefix is None else row.prefix, int(row.hidden > 0), -len(row.tokens))

    batch: list[ScoreRow] = []
    for row in sorted(rows, key=order):
        if batch and (len(batch) == size or order(row)[:2] != order(batch[0])[:2]):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def score_tensors(batch: Sequence[ScoreRow]) -> tuple[ForwardBatch, torch.Tensor, torch.Tensor]:
    """(rows padded on the right, positions [m, 2], targets [m]) of one batch, spans in order."""
    longest = max(len(row.tokens) for row in batch)
    tokens = torch.tensor([row.tokens + [0] * (longest - len(row.tokens)) for row in batch])
    prefix_mask = None
    if any(row.hidden for row in batch):
        prefix_mask = torch.tensor([[0] * row.hidden + [1] * (longest - row.hidden) for row in batch])
    positions, targets = [], []
    for number, row in enumerate(batch):
        for _, first, span_targets in row.spans:
            positions += [(number, first + i) for i in range(len(span_targets))]
            targets += span_targets
    inputs = {"prefix_length": batch[0].prefix, "prefix_mask": prefix_mask}
    return ForwardBatch(tokens, None, inputs), torch.tensor(positions), torch.tensor(targets)


def prompt_rows(prompts: Sequence[Sequence[int]], prefix: Prefix) -> ForwardBatch:
    """Prompts for generation, filled according to `prefix` and padded on the left with a mask."""
    filled = [fill_prompt(prompt, prefix.mode, prefix.length, prefix.filler) for prompt in prompts]
    cpu = torch.device("cpu")
    tokens, mask = left_pad([row for row, _ in filled], 0, cpu)
    hidden = filler_mask([count for _, count in filled], [len(row) for row, _ in filled], cpu)
    return ForwardBatch(tokens, mask, {"prefix_length": prefix.length or None, "prefix_mask": hidden})
