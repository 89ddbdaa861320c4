"""The texts that an evaluation reads: documents of a split or of a text file, or their stream with its words and bytes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.indexed import IndexedDataset
from megatron.data.order import split_documents
from megatron.data.tokenizers import Tokenizer
from megatron.errors import DataError
from megatron.files import read_text


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


def _split_documents(data_path: str, split: str, name: str) -> Iterator[NDArray[Any]]:
    """The documents of split `name` of a corpus."""
    indexed = IndexedDataset(data_path)
    yield from (indexed.get(number) for number in split_documents(split, len(indexed))[name])


def _corpora_documents(data_paths: Sequence[str]) -> Iterator[NDArray[Any]]:
    """The documents of complete corpora."""
    for path in data_paths:
        indexed = IndexedDataset(path)
        yield from (indexed.get(number) for number in range(len(indexed)))


def text_documents(path: str | Path, tokenizer: Tokenizer) -> Iterator[NDArray[Any]]:
    """The documents of a text file (one) or of a `.jsonl` file (the `text` of each row).

    Raises:
        DataError: the file cannot be read, or a row has no text.
    """
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError("the text file cannot be read", where=str(path), why=why) from None
    if Path(path).suffix != ".jsonl":
        yield np.asarray(tokenizer.tokenize(text), dtype=np.int64)
        return
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)["text"]
        except (ValueError, TypeError, KeyError):
            raise DataError("a row has no text", where=f"{path}:{number}", hint='rows are {"text": "..."}') from None
        yield np.asarray(tokenizer.tokenize(row), dtype=np.int64)


def run_documents(
    text: str | None, data_path: str | None, split: str, name: str, paths: Sequence[str] | None, tokenizer: Tokenizer
) -> tuple[Iterator[NDArray[Any]], str]:
    """The documents of a run, and their place for messages.

    Args:
        text: a text or .jsonl file, which replaces the corpus.
        data_path: the corpus of the run.
        split: its split, such as `969, 30, 1`.
        name: train | valid | test.
        paths: corpora of this split, if there is no `data_path`.
        tokenizer: of the model, for `text`.

    Raises:
        DataError: there is no text at all.
    """
    if text is not None:
        return text_documents(text, tokenizer), text
    if data_path is not None:
        return _split_documents(data_path, split, name), f"{data_path}, split {name} of '{split}'"
    if paths:
        return _corpora_documents(paths), ", ".join(paths)
    raise DataError("there is no text to read", hint=f"--eval_text FILE, or set data_path, or {name}_data_paths")
