"""From lm-eval's requests to passes of the model, such that a score does not depend on what shares its batch.

Scoring pads on the right, which no causal mixer can see; rows whose prefix layers (`jrt`) look at the whole prefix go together
only when their prefixes have one length, so padding is never inside one. Generation pads on the left with a mask that every
mixer honours exactly. Requests that read the same tokens (the one-token choices of a question) share one row.

What a prefix model is given is in `options.Prefix`.
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
    """One row of tokens and the (request, first target's index, targets) that are scored on it.

    prefix: its prefix length, None for a model without. hidden: filler tokens in front.
    """

    tokens: list[int]
    prefix: int | None
    hidden: int
    spans: list[tuple[int, int, list[int]]] = field(default_factory=list)


def score_row(context: Sequence[int], targets: Sequence[int], max_length: int, prefix: Prefix) -> ScoreRow:
    """The row that scores `targets` after `context`: at most `max_length` tokens are read, the last ones.

    The span's request number is left at 0. context: at least one token.
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
    """The same work with every distinct row once; request i is `rows[i]`."""
    known: dict[tuple[object, ...], ScoreRow] = {}
    for number, row in enumerate(rows):
        key = (row.prefix, row.hidden, *row.tokens)
        kept = known.setdefault(key, ScoreRow(row.tokens, row.prefix, row.hidden))
        kept.spans += [(number, first, targets) for _, first, targets in row.spans]
    return list(known.values())


def score_batches(rows: Sequence[ScoreRow], size: int) -> Iterator[list[ScoreRow]]:
    """Batches of at most `size` rows of one prefix length, the longest first."""

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
    """(rows padded on the right, places [m, 2], targets [m]) of one batch, spans in order."""
    longest = max(len(row.tokens) for row in batch)
    tokens = torch.tensor([row.tokens + [0] * (longest - len(row.tokens)) for row in batch])
    filler = None
    if any(row.hidden for row in batch):
        filler = torch.tensor([[0] * row.hidden + [1] * (longest - row.hidden) for row in batch])
    places, targets = [], []
    for number, row in enumerate(batch):
        for _, first, wanted in row.spans:
            places += [(number, first + i) for i in range(len(wanted))]
            targets += wanted
    inputs = {"prefix_length": batch[0].prefix, "prefix_mask": filler}
    return ForwardBatch(tokens, None, inputs), torch.tensor(places), torch.tensor(targets)


def prompt_rows(prompts: Sequence[Sequence[int]], prefix: Prefix) -> ForwardBatch:
    """Prompts to be continued, filled as `prefix` says and padded on the left with a mask."""
    filled = [fill_prompt(prompt, prefix.mode, prefix.length, prefix.filler) for prompt in prompts]
    cpu = torch.device("cpu")
    tokens, mask = left_pad([row for row, _ in filled], 0, cpu)
    hidden = filler_mask([count for _, count in filled], [len(row) for row, _ in filled], cpu)
    return ForwardBatch(tokens, mask, {"prefix_length": prefix.length or None, "prefix_mask": hidden})
