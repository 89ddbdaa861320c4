"""A ladder of needle prompts: kinds x lengths x depths, answered by greedy generation and by likelihood.

Every prompt is read once. From its state the model scores the right answer (`exact`: every token is the likeliest one, given
the right ones before it; `nll`: nats per token), chooses between the right value and wrong ones (`choice`: by likelihood), and
generates greedily (`accuracy`: the share of the values in the generated text, RULER's metric).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron.data.tokenizer_base import Tokenizer
from megatron.errors import ConfigError, DataError
from megatron.evaluation.chunked import PromptReader
from megatron.evaluation.niah import Case, CaseSource
from megatron.generation.sample import Sampling, decode

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
EXAMPLES = 4
METRICS = ("accuracy", "exact", "choice")


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        lengths: tokens of prompt and answer together.
        depths: of the first needle, as a share of the haystack.
        examples: per length and depth.
        seed: of all examples; example i of a cell depends on the seed, the kind, the length, the depth and i alone.
        tokens_per_batch: prompts of a cell share passes up to this many tokens.
    """

    lengths: tuple[int, ...] = LENGTHS
    depths: tuple[float, ...] = DEPTHS
    examples: int = EXAMPLES
    seed: int = 1234
    tokens_per_batch: int = 16384

    def __post_init__(self) -> None:
        if not self.lengths or not self.depths or self.examples < 1:
            raise ConfigError("the ladder has no rung", why="it needs lengths, depths and at least one example of each")
        if any(not 0 <= depth <= 1 for depth in self.depths):
            raise ConfigError(f"a depth of {next(d for d in self.depths if not 0 <= d <= 1)}", why="depths are from 0 to 1")


@dataclass
class Cell:
    """The results of one length and depth.

    Attributes:
        accuracy: per example, the share of its values in the generated text.
        exact: per example, whether the likeliest tokens are the right answer.
        choice: per example, whether the right value is likelier than wrong ones.
        nll: per example, nats per token of the right answer.
        by_value: (depth, whether the generated text contains it) of every value.
    """

    accuracy: list[float] = field(default_factory=list)
    exact: list[float] = field(default_factory=list)
    choice: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    by_value: list[tuple[float, bool]] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """A JSON object of means; where an example has several values, also each value's depth and whether it was generated."""
        means = {name: round(_mean(getattr(self, name)), 4) for name in (*METRICS, "nll")}
        several = len(self.by_value) > len(self.accuracy)
        values = {"values": [[round(depth, 4), hit] for depth, hit in self.by_value]} if several else {}
        return {"examples": len(self.accuracy), **means, **values}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def cases(source: CaseSource, plan: Plan, length: int, depth: float) -> Iterator[Case]:
    """The examples of a cell."""
    for number in range(plan.examples):
        words = [*source.name.encode(), 0, length, round(depth * 10**6), number]
        yield source.case(np.random.default_rng([plan.seed, *words]), length, depth)


def climb(
    source: CaseSource, read: Callable[[Tensor], PromptReader], tokenizer: Tokenizer, plan: Plan
) -> Iterator[dict[str, Any]]:
    """The rows of a ladder, one per length and depth, as JSON objects.

    A length that the model cannot read (learned positions) gives rows with an `error`.

    Args:
        source: of the prompts.
        read: opens prompts [b, s] for a model.
        tokenizer: of the model.
        plan: what is measured.

    Raises:
        DataError: no prompt of a length can be made.
    """
    for length in plan.lengths:
        for depth in plan.depths:
            started, cell = time.monotonic(), Cell()
            row: dict[str, Any] = {"task": source.name, "length": length, "depth": depth}
            try:
                for batch in _batches(cases(source, plan, length, depth), plan.tokens_per_batch):
                    prompts = torch.from_numpy(np.stack([case.prompt for case in batch]))
                    answer(batch, read(prompts), tokenizer, cell)
            except ValueError as error:  # longer than the learned positions
                yield {**row, "error": str(error)}
                continue
            yield {**row, **cell.report(), "seconds": round(time.monotonic() - started, 2)}


def _batches(stream: Iterable[Case], tokens: int) -> Iterator[list[Case]]:
    """Prompts of equal length, together at most `tokens` long."""
    batch: list[Case] = []
    for case in stream:
        if batch and (len(batch[0].prompt) != len(case.prompt) or (len(batch) + 1) * len(case.prompt) > tokens):
            yield batch
            batch = []
        batch.append(case)
    if batch:
        yield batch


def answer(batch: Sequence[Case], reader: PromptReader, tokenizer: Tokenizer, cell: Cell) -> None:
    """Score and generate the answers of a batch, and add the results to `cell`."""
    scores, likeliest, sizes = _scored(reader, [case.answer for case in batch])
    cell.nll += [-float(row[:size].sum()) / size for row, size in zip(scores, sizes, strict=True)]
    cell.exact += [float(row[:size].all()) for row, size in zip(likeliest, sizes, strict=True)]
    totals = []
    for number in range(min(len(case.choices) for case in batch)):
        scores, _, sizes = _scored(reader, [case.choices[number] for case in batch])
        totals.append([float(row[:size].sum()) for row, size in zip(scores, sizes, strict=True)])
    cell.choice += [float(all(row[0] > other for other in row[1:])) for row in zip(*totals, strict=True)]
    texts = generated(batch, reader, tokenizer)
    for case, hits in zip(batch, texts, strict=True):
        cell.accuracy.append(_mean([float(hit) for hit in hits]))
        cell.by_value += list(zip(case.depths, hits, strict=True))


def _scored(reader: PromptReader, answers: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, list[int]]:
    """Scores of answers of different sizes, padded on the right, and the sizes."""
    sizes = [len(ids) for ids in answers]
    padded = torch.tensor([[*ids, *[0] * (max(sizes) - len(ids))] for ids in answers])
    return *reader.score(padded), sizes


def generated(batch: Sequence[Case], reader: PromptReader, tokenizer: Tokenizer) -> list[list[bool]]:
    """Per prompt, which of its values the greedy continuation contains."""
    new: list[list[int]] = [[] for _ in batch]
    ends = set()
    with contextlib.suppress(DataError):  # a vocabulary without an end of document
        ends.add(tokenizer.eod)

    def accept(row: int, token: int, _: Tensor) -> bool:
        if token in ends:
            return False
        new[row].append(token)
        return len(new[row]) < batch[row].room and not all(hits(batch[row], new[row], tokenizer))

    decode(reader, Sampling(), 0, [True] * len(batch), accept, tokenizer.vocab_size)
    return [hits(case, ids, tokenizer) for case, ids in zip(batch, new, strict=True)]


def hits(case: Case, ids: Sequence[int], tokenizer: Tokenizer) -> list[bool]:
    """Which values of a prompt the generated ids contain; without values, whether they begin with the answer."""
    if not case.values:
        return [tuple(ids[: len(case.answer)]) == case.answer]
    text = tokenizer.detokenize(ids).lower()
    return [value.lower() in text for value in case.values]


def table(rows: Sequence[Mapping[str, Any]], metric: str = "accuracy") -> str:
    """Accuracy in percent over length (lines) and depth (columns) of one kind, with the mean of each line."""
    depths = sorted({row["depth"] for row in rows})
    lines = [
        f"{rows[0]['task']} {metric:<12}"[:24].ljust(24) + "".join(f"{f'depth {d:g}':>12}" for d in depths) + f"{'mean':>8}"
    ]
    for length in dict.fromkeys(row["length"] for row in rows):
        here = {row["depth"]: row for row in rows if row["length"] == length}
        error = next((row["error"] for row in here.values() if "error" in row), None)
        if error is not None:
            lines.append(f"{length:>24}  {error}")
            continue
        shares = [here[d][metric] for d in depths]
        lines.append(f"{length:>24}" + "".join(f"{100 * s:>12.1f}" for s in shares) + f"{100 * _mean(shares):>8.1f}")
    return "\n".join(lines)


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Column (`niah_single_1@1024`) -> metric -> mean over the depths; columns as in the tables of published scores."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if "error" not in row:
            groups.setdefault(f"{row['task']}@{row['length']}", []).append(row)
    return {name: {metric: round(_mean([r[metric] for r in part]), 4) for metric in METRICS} for name, part in groups.items()}
