"""Rows to tokens, in this process or in several; the order of the rows stays, and a bad row is an answer, not an end."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.labels import IGNORED
from megatron.data.rows import Row, row_texts
from megatron.data.token_format import dtype_for_vocab
from megatron.data.tokenizers import build_tokenizer
from megatron.errors import DataError

_BATCH_ROWS, _BATCH_BYTES = 256, 1 << 20


@dataclass(frozen=True)
class EncodeJob:
    """All a worker must know.

    Attributes:
        tokenizer_type, vocab_file, merge_file: see `build_tokenizer`.
        keys: fields of a JSON record, one output each.
        append_eod: end each document by the tokenizer's eod.
        ftfy: repair mojibake with the package ftfy.
        mask_before: token ids; a second output holds labels that ignore everything up to and with their first occurrence.
        cached: write NeoX's legacy format, which is always int32.
    """

    tokenizer_type: str
    vocab_file: str | None = None
    merge_file: str | None = None
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    ftfy: bool = False
    mask_before: tuple[int, ...] = ()
    cached: bool = False

    def key(self) -> dict[str, Any]:
        """What the result depends on, without the tokenizer's files (their fingerprint says more)."""
        return {name: value for name, value in asdict(self).items() if name not in ("vocab_file", "merge_file")}


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read: the parts of its error."""

    what: str
    where: str
    why: str | None
    hint: str | None

    def error(self) -> DataError:
        """The error it would be without a limit for bad rows."""
        return DataError(self.what, where=self.where, why=self.why, hint=self.hint)


# Per row: the tokens of each output (None where the text is empty), or why there are none.
Encoded = list[list[NDArray[Any] | None] | BadRow]


class Encoder:
    """Rows to tokens, in this process."""

    def __init__(self, job: EncodeJob) -> None:
        self.job = job
        self.tokenizer = build_tokenizer(job.tokenizer_type, job.vocab_file, job.merge_file)
        # NeoX's legacy format and its files with labels are int32 whatever the vocabulary is.
        wide = job.cached or bool(job.mask_before)
        self.dtype = np.dtype("<i4") if wide else dtype_for_vocab(self.tokenizer.vocab_size)
        self._end = [self.tokenizer.eod] if job.append_eod else []
        self._fix = _fix_text() if job.ftfy else None

    def outputs(self) -> list[tuple[str, np.dtype[Any]]]:
        """(name, type of a token) of each file pair."""
        pairs = [(f"{key}_document", self.dtype) for key in self.job.keys]
        return [*pairs, ("label_document", self.dtype)] if self.job.mask_before else pairs

    def encode(self, rows: Sequence[Row]) -> Encoded:
        """Tokens per row and output."""
        read = [self._texts(row) for row in rows]
        texts = [text for texts in read if not isinstance(texts, BadRow) for text in texts if text]
        ids = iter(self.tokenizer.tokenize_batch(texts))
        return [
            texts if isinstance(texts, BadRow) else self._outputs([next(ids) if text else None for text in texts])
            for texts in read
        ]

    def _texts(self, row: Row) -> list[str] | BadRow:
        try:
            texts = row_texts(row, self.job.keys)
        except DataError as error:
            return BadRow(error.what, error.where or row.where, error.why, error.hint)
        return texts if self._fix is None else [self._fix(text) for text in texts]

    def _outputs(self, ids: list[list[int] | None]) -> list[NDArray[Any] | None]:
        found = [None if one is None else self._finish(one) for one in ids]
        return [*found, self._labels(found[0])] if self.job.mask_before else found

    def _finish(self, ids: list[int]) -> NDArray[Any]:
        if ids and self._end:
            ids.append(self._end[0])
        return np.array(ids, dtype=self.dtype)

    def _labels(self, tokens: NDArray[Any] | None) -> NDArray[Any] | None:
        if tokens is None:
            return None
        labels, mark = tokens.astype(np.int32), self.job.mask_before
        for at in np.flatnonzero(labels == mark[0]).tolist():
            if labels[at : at + len(mark)].tolist() == list(mark):
                labels[: at + len(mark)] = IGNORED
                break
        return labels


def in_batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows in groups that are worth sending to another process."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row)
        if len(batch) >= _BATCH_ROWS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_here(encoder: Encoder, batches: Iterable[list[Row]]) -> Iterator[tuple[list[Row], Encoded]]:
    """Each batch with its tokens."""
    for batch in batches:
        yield batch, encoder.encode(batch)


def encode_in_pool(job: EncodeJob, batches: Iterable[list[Row]], workers: int) -> Iterator[tuple[list[Row], Encoded]]:
    """The same pairs in the same order; at most four batches per worker are in memory."""
    # Fresh processes: a fork would copy the locks of the tokenizer library's threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(job,))
    waiting: deque[tuple[list[Row], Future[Encoded]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_encode_in_worker, batch)))
            if len(waiting) >= 4 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: list[Encoder] = []  # of this process, when it is one of the pool


def _start_worker(job: EncodeJob) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker[:] = [Encoder(job)]


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(rows: list[Row]) -> Encoded:
    return _worker[0].encode(rows)


def _fix_text() -> Callable[[str], str]:
    try:
        return importlib.import_module("ftfy").fix_text  # type: ignore[no-any-return]
    except ImportError:
        raise DataError("--ftfy needs the package ftfy", why="it is not installed", hint="pip install ftfy") from None
