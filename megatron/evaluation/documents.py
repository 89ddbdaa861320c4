"""The token stream that an evaluation scores: the concatenated documents of a split, and its length in words and bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.indexed import IndexedDataset
from megatron.data.order import split_documents
from megatron.data.tokenizers import Tokenizer
from megatron.errors import DataError


@dataclass(frozen=True)
class Stream:
    """A stream of tokens.

    Attributes:
        tokens: [N] ids.
        words: words of the text, split at white space, plus one per newline (WikiText's convention).
        size: bytes of the text.
    """

    tokens: NDArray[Any]
    words: int
    size: int


def split_tokens(data_path: str, split: str, name: str, limit: int | None = None) -> NDArray[Any]:
    """Tokens of the documents of split `name` (train, valid, test) of one corpus, at most `limit`.

    Raises:
        DataError: the corpus does not exist, or the split is empty.
    """
    indexed = IndexedDataset(data_path)
    return _joined(indexed, split_documents(split, len(indexed))[name], limit, f"{data_path}, split {name} of '{split}'")


def corpora_tokens(data_paths: Sequence[str], limit: int | None = None) -> NDArray[Any]:
    """Tokens of complete corpora in order, at most `limit`; errors as in `split_tokens`."""
    chunks: list[NDArray[Any]] = []
    total = 0
    for path in data_paths:
        if limit is not None and total >= limit:
            break
        indexed = IndexedDataset(path)
        chunks.append(_joined(indexed, range(len(indexed)), None if limit is None else limit - total, path))
        total += len(chunks[-1])
    return np.concatenate(chunks)


def _joined(indexed: IndexedDataset, documents: range, limit: int | None, where: str) -> NDArray[Any]:
    chunks: list[NDArray[Any]] = []
    total = 0
    for document in documents:
        if limit is not None and total >= limit:
            break
        chunks.append(indexed.get(document))
        total += len(chunks[-1])
    if not total:
        raise DataError("there is nothing to evaluate", where=where, hint="choose another eval_split, or another split")
    return np.concatenate(chunks)[:limit]


def measured(tokens: NDArray[Any], tokenizer: Tokenizer) -> Stream:
    """Count the words and bytes of a stream's text, without end-of-document tokens and the template's tokens."""
    boundaries = [*tokenizer.template.before, *tokenizer.template.after]
    with contextlib.suppress(DataError):  # a vocabulary without an end of document
        boundaries.append(tokenizer.eod)
    ends = np.flatnonzero(np.isin(tokens, boundaries))
    words = size = start = 0
    for end in [*ends.tolist(), len(tokens)]:
        text = tokenizer.detokenize(tokens[start:end].tolist())
        words += len(text.split()) + text.count("\n")
        size += len(text.encode())
        start = end + 1
    return Stream(tokens, words, size)
