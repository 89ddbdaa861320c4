"""Turns text into token files: rows go to workers in batches, tokens come back in order, one writer per key.

Whatever the number of workers, the files are the same bytes. An error anywhere removes what was written so far.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.indexed_writer import IndexedWriter
from megatron.data.readers import Row, expand_inputs, read_rows, row_texts
from megatron.data.token_format import dtype_for_vocab
from megatron.data.tokenizers import build_tokenizer
from megatron.errors import DataError

_BATCH_ROWS, _BATCH_BYTES = 256, 1 << 20
log = logging.getLogger(__name__)

Encoded = list[list[NDArray[Any] | None]]  # per row, per key: tokens, or None where the text is empty


@dataclass(frozen=True)
class EncodeJob:
    """All a worker must know.

    Attributes:
        tokenizer_type, vocab_file, merge_file: see `build_tokenizer`.
        keys: fields of a JSON record, one output each.
        append_eod: end each document by the tokenizer's eod.
        ftfy: repair mojibake with the package ftfy.
    """

    tokenizer_type: str
    vocab_file: str | None = None
    merge_file: str | None = None
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    ftfy: bool = False


@dataclass
class EncodeSummary:
    """What was written: documents read, documents without text, bytes of input, tokens per key, seconds."""

    documents: int
    empty: int
    bytes: int
    tokens: dict[str, int]
    seconds: float


class Encoder:
    """Rows to tokens, in this process."""

    def __init__(self, job: EncodeJob) -> None:
        self.job = job
        self.tokenizer = build_tokenizer(job.tokenizer_type, job.vocab_file, job.merge_file)
        self.dtype = dtype_for_vocab(self.tokenizer.vocab_size)
        self._end = [self.tokenizer.eod] if job.append_eod else []
        self._fix = _fix_text() if job.ftfy else None

    def encode(self, rows: Sequence[Row]) -> Encoded:
        """Tokens per row and key.

        Raises:
            DataError: a row cannot be read, see `row_texts`.
        """
        texts = [text for row in rows for text in row_texts(row, self.job.keys)]
        if self._fix is not None:
            texts = [self._fix(text) for text in texts]
        ids = iter(self.tokenizer.tokenize_batch([text for text in texts if text]))
        flat = [self._finish(next(ids)) if text else None for text in texts]
        width = len(self.job.keys)
        return [flat[at : at + width] for at in range(0, len(flat), width)]

    def _finish(self, ids: list[int]) -> NDArray[Any]:
        return np.array(ids + self._end if ids else [], dtype=self.dtype)


def encode_corpus(
    job: EncodeJob, inputs: Sequence[str], output_prefix: str, workers: int = 1, log_interval: int = 100
) -> EncodeSummary:
    """Write `{output_prefix}_{key}_document.bin/.idx` for each key.

    Args:
        inputs: files or folders, see `expand_inputs`.
        workers: processes that tokenise; with 1 it happens here.
        log_interval: documents between two lines of progress.

    Raises:
        DataError: no text at all, a row that cannot be read, a wrong tokenizer, or a disk that cannot be written.
    """
    encoder = Encoder(job)
    batches = _in_batches(read_rows(expand_inputs(inputs)))
    results = _encode_here(encoder, batches) if workers <= 1 else _encode_in_pool(job, batches, workers)
    try:
        return _write(encoder, results, output_prefix, log_interval)
    except OSError as error:
        raise DataError(
            "the corpus cannot be written", where=error.filename or output_prefix, why=error.strerror
        ) from None


def _write(
    encoder: Encoder, results: Iterable[tuple[list[Row], Encoded]], output_prefix: str, log_interval: int
) -> EncodeSummary:
    started, keys = time.monotonic(), encoder.job.keys
    summary = EncodeSummary(0, 0, 0, {}, 0.0)
    with ExitStack() as stack:
        writers = [stack.enter_context(IndexedWriter(f"{output_prefix}_{key}_document", encoder.dtype)) for key in keys]
        for rows, encoded in results:
            for row, documents in zip(rows, encoded, strict=True):
                summary.documents += 1
                summary.bytes += len(row.data)
                summary.empty += all(tokens is None or len(tokens) == 0 for tokens in documents)
                for writer, tokens in zip(writers, documents, strict=True):
                    _add(writer, tokens)
                if summary.documents % log_interval == 0:
                    _report(summary, time.monotonic() - started)
        summary.tokens = {key: writer.total_tokens for key, writer in zip(keys, writers, strict=True)}
        for key, total in summary.tokens.items():
            if total == 0:
                why = f"{summary.documents} documents were read, none has text under {key!r}"
                raise DataError("the corpus is empty", where=output_prefix, why=why)
    summary.seconds = time.monotonic() - started
    return summary


def _add(writer: IndexedWriter, tokens: NDArray[Any] | None) -> None:
    """As NeoX: no text leaves no trace; text without a token (a blank for some tokenizers) leaves a border only."""
    if tokens is None:
        return
    if len(tokens):
        writer.add_sequence(tokens)
    writer.end_document()


def _report(summary: EncodeSummary, seconds: float) -> None:
    rate = summary.documents / max(seconds, 1e-9)
    log.info("%d documents, %.1f MB, %.0f documents/s", summary.documents, summary.bytes / 1e6, rate)


def _in_batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.data)
        if len(batch) >= _BATCH_ROWS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_here(encoder: Encoder, batches: Iterable[list[Row]]) -> Iterator[tuple[list[Row], Encoded]]:
    for batch in batches:
        yield batch, encoder.encode(batch)


def _encode_in_pool(job: EncodeJob, batches: Iterable[list[Row]], workers: int) -> Iterator[tuple[list[Row], Encoded]]:
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


_worker_encoder: Encoder | None = None


def _start_worker(job: EncodeJob) -> None:
    global _worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_encoder = Encoder(job)


def _encode_in_worker(rows: list[Row]) -> Encoded:
    assert _worker_encoder is not None
    return _worker_encoder.encode(rows)


def _fix_text() -> Callable[[str], str]:
    try:
        return importlib.import_module("ftfy").fix_text  # type: ignore[no-any-return]
    except ImportError:
        raise DataError("--ftfy needs the package ftfy", why="it is not installed", hint="pip install ftfy") from None
