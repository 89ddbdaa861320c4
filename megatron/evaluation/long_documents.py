"""Loss over the position in long documents: does a model still predict beyond the length that it was trained on?

Each document is read once from an empty state, in chunks; documents shorter than the longest length are left out, so that all
positions average over the same documents. `perplexity.py` measures the other question, a stream in blocks of each length.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron.errors import ConfigError, DataError
from megatron.evaluation.chunked import token_losses
from megatron.evaluation.perplexity import check_ids
from megatron.model.lm import LanguageModel

DOCUMENT_LIMIT = 64
TIMES = (0.25, 0.5, 1, 2, 4, 8, 16)  # of the training length: the default lengths


@dataclass(frozen=True)
class LongDocuments:
    """The documents that are long enough.

    Attributes:
        tokens: [d, n] ids, the first n tokens of each.
        count: documents that were looked at.
        where: their place, for messages.
    """

    tokens: NDArray[np.int64]
    count: int
    where: str

    @property
    def excluded(self) -> int:
        """Documents that were left out because they are shorter."""
        return self.count - len(self.tokens)


def default_lengths(trained: int) -> tuple[int, ...]:
    """From a quarter of the training length to 16 times of it."""
    return tuple(sorted({max(1, int(times * trained)) for times in TIMES}))


def select(documents: Iterator[NDArray[Any]], length: int, where: str, limit: int | None = None) -> LongDocuments:
    """The first `limit` documents of at least `length` tokens; those before and between them that are shorter are counted.

    Raises:
        DataError: no document is long enough.
    """
    chosen: list[NDArray[Any]] = []
    count = longest = 0
    for document in documents:
        count, longest = count + 1, max(longest, len(document))
        if len(document) >= length:
            chosen.append(np.asarray(document[:length], dtype=np.int64))
        if limit is not None and len(chosen) >= limit:
            break
    if not chosen:
        raise DataError(
            f"no document has {length:,} tokens",
            where=where,
            why=f"the longest of {count:,} documents has {longest:,}",
            hint="shorter lengths (--lengths), another eval_split, or a longer text: --set eval_text=FILE",
        )
    return LongDocuments(np.stack(chosen), count, where)


@torch.inference_mode()
def position_losses(
    model: LanguageModel,
    documents: LongDocuments,
    first: int,
    *,
    vocab_size: int | None = None,
    backend: str = "auto",
    tokens_per_batch: int = 16384,
    chunk: int | None = None,
) -> Tensor:
    """-log p [n] in fp64 at each position, the mean over the documents.

    Args:
        model: in evaluation mode.
        documents: d documents of n tokens.
        first: id before each document.
        vocab_size: true vocabulary size.
        backend: see `Context`.
        tokens_per_batch: documents share passes up to this many tokens.
        chunk: tokens per pass, None: as fits into memory.

    Raises:
        ConfigError: the documents are longer than the model's learned positions.
        DataError: a token is outside `vocab_size`.
    """
    tokens = documents.tokens
    check_ids(tokens, vocab_size)
    total = torch.zeros(tokens.shape[1], dtype=torch.float64)
    rows = max(1, tokens_per_batch // tokens.shape[1])
    for start in range(0, len(tokens), rows):
        targets = torch.from_numpy(tokens[start : start + rows])
        inputs = torch.cat([torch.full((len(targets), 1), first), targets[:, :-1]], 1)
        try:
            total += token_losses(model, inputs, targets, vocab_size=vocab_size, backend=backend, chunk=chunk).sum(0)
        except ValueError as error:
            raise ConfigError("the model cannot read documents of this length", why=str(error), hint="--lengths") from None
    return total / len(tokens)


def report(losses: Tensor, lengths: Sequence[int], documents: LongDocuments, seconds: float) -> dict[str, Any]:
    """A JSON object: per length the loss of the positions since the one before (`bucket`), and of all up to it (`up_to`)."""
    rows, before = [], 0
    for length in lengths:
        inside, whole = float(losses[before:length].mean()), float(losses[:length].mean())
        rows.append(
            {
                "from": before,
                "length": length,
                "loss": inside,
                "perplexity": math.exp(inside),
                "loss_up_to": whole,
                "perplexity_up_to": math.exp(whole),
            }
        )
        before = length
    facts = {"documents": len(documents.tokens), "excluded_documents": documents.excluded, "source": documents.where}
    return {**facts, "tokens": documents.tokens.size, "seconds": round(seconds, 2), "rows": rows}


def measure(
    model: LanguageModel, documents: LongDocuments, lengths: Sequence[int], first: int, **options: Any
) -> dict[str, Any]:
    """`report` of `position_losses`, timed; options as there."""
    started = time.monotonic()
    losses = position_losses(model, documents, first, **options)
    return report(losses, lengths, documents, time.monotonic() - started)


def table(result: dict[str, Any]) -> str:
    """A table with aligned columns."""
    lines = [
        f"{result['documents']} documents, {result['excluded_documents']} shorter ones excluded ({result['source']})",
        f"{'positions':>16} {'loss':>9} {'perplexity':>11} {'up to':>9} {'perplexity':>11}",
    ]
    for row in result["rows"]:
        places = f"{row['from']}..{row['length'] - 1}"
        lines.append(
            f"{places:>16} {row['loss']:>9.4f} {row['perplexity']:>11.3f} {row['length']:>9} {row['perplexity_up_to']:>11.3f}"
        )
    return "\n".join(lines)
