"""What an evaluation scores: the documents of one split, one after the other, and their length in words and bytes."""

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
    """tokens [N]; words: separated by white space, each line end counting as one (WikiText's convention); size in bytes."""

    tokens: NDArray[Any]
    words: int
    size: int


def split_tokens(data_path: str, split: str, name: str, limit: int | None = None) -> NDArray[Any]:
    """Tokens of the documents of split `name` (train, valid, test) of one corpus, at most `limit`.

    Raises:
        DataError: no such corpus, or the split is empty.
    """
    indexed = IndexedDataset(data_path)
    return _joined(indexed, split_documents(split, len(indexed))[name], limit, f"{data_path}, split {name} of '{split}'")


def corpora_tokens(data_paths: Sequence[str], limit: int | None = None) -> NDArray[Any]:
    """Tokens of whole corpora in order, at most `limit`; errors as in `split_tokens`."""
    parts: list[NDArray[Any]] = []
    have = 0
    for path in data_paths:
        if limit is not None and have >= limit:
            break
        indexed = IndexedDataset(path)
        parts.append(_joined(indexed, range(len(indexed)), None if limit is None else limit - have, path))
        have += len(parts[-1])
    return np.concatenate(parts)


def _joined(indexed: IndexedDataset, documents: range, limit: int | None, where: str) -> NDArray[Any]:
    parts: list[NDArray[Any]] = []
    have = 0
    for document in documents:
        if limit is not None and have >= limit:
            break
        parts.append(indexed.get(document))
        have += len(parts[-1])
    if not have:
        raise DataError("there is nothing to evaluate", where=where, hint="choose another eval_split, or another split")
    return np.concatenate(parts)[:limit]


def measured(tokens: NDArray[Any], tokenizer: Tokenizer) -> Stream:
    """The stream with the words and bytes of its text; ends of documents and what a template adds are no text."""
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
