"""Encodes text into token files: rows go to workers in batches, tokens come back in order, one writer per output.

Whatever the number of workers and however often the process is killed, the files have the same bytes: `partial_files.py` holds
the finished tokens, the journal `PREFIX.progress.json` the position of the last finished row. After an error a later run can
resume (for example with a limit for bad rows), or there is nothing on disk.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron.data.checksums import write_checksums
from megatron.data.encoder import BadRow, Encoded, EncodeJob, Encoder, encode_here, encode_in_pool, in_batches
from megatron.data.fingerprint import describe, write_meta
from megatron.data.labels import is_unmarked
from megatron.data.partial_files import PartialPair, PartialFile, publish_pair, remove_partial_files
from megatron.data.progress import Progress
from megatron.data.readers import RowReader, expand_inputs
from megatron.data.rows import RowPosition, Row
from megatron.errors import DataError
from megatron.files import read_json, write_json

__all__ = ["EncodeJob", "EncodeOptions", "EncodeSummary", "encode_corpus", "encode_rows"]
log = logging.getLogger(__name__)


class RowSource(Protocol):
    """Rows that can be read from any position: see `readers.RowReader`."""

    total_bytes: int

    @property
    def done_bytes(self) -> int:
        """Bytes of the input read so far."""
        ...

    def identity(self) -> Any:
        """JSON that changes when the input does."""
        ...

    def __iter__(self) -> Iterator[Row]: ...


@dataclass(frozen=True)
class EncodeOptions:
    """Execution options; none of them affects the files.

    Attributes:
        workers: processes that tokenise; 1 tokenises in this process.
        log_interval: documents between two progress lines.
        bad_row_limit: number of bad rows to set aside in `PREFIX_bad_rows.jsonl`; the next one is an error.
        checksums: write `.sums.json` for each pair.
        commit_seconds: seconds between two commits, from which a killed run can resume.
    """

    workers: int = 1
    log_interval: int = 100
    bad_row_limit: int = 0
    checksums: bool = True
    commit_seconds: float = 5.0


@dataclass
class EncodeSummary:
    """Counts of a finished job.

    Attributes:
        documents: rows read.
        empty: rows without text.
        bad: rows set aside.
        bytes: bytes of input.
        tokens: tokens per output.
        seconds: time of this process.
        resumed_at: documents that an interrupted run had finished.
        unmarked: documents without the marker of `mask_before`; all their tokens count in the loss.
        first_unmarked: file and line of the first of them.
    """

    documents: int = 0
    empty: int = 0
    bad: int = 0
    bytes: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    resumed_at: int = 0
    unmarked: int = 0
    first_unmarked: str = ""


def encode_corpus(
    job: EncodeJob, inputs: Sequence[str], output_prefix: str, options: EncodeOptions | None = None
) -> EncodeSummary:
    """Write `{output_prefix}_{key}_document.bin/.idx` for each key.

    Args:
        job: tokenizer and what to encode.
        inputs: files, folders or `hf:` datasets, see `expand_inputs`.
        output_prefix: path and common part of the outputs' names.
        options: execution options; None: the defaults.

    Raises:
        DataError: there is no text, too many bad rows, a wrong tokenizer, or the disk cannot be written.
    """
    sources = expand_inputs(inputs)
    return encode_rows(job, lambda start: RowReader(sources, job.keys, start), output_prefix, options)


def encode_rows(
    job: EncodeJob,
    open_source: Callable[[RowPosition], RowSource],
    output_prefix: str,
    options: EncodeOptions | None = None,
) -> EncodeSummary:
    """`encode_corpus` for rows of any source; `open_source` receives the position to resume from."""
    try:
        return _Run(job, open_source, output_prefix, options or EncodeOptions()).run()
    except OSError as error:
        raise DataError("the corpus cannot be written", where=error.filename or output_prefix, why=error.strerror) from None


class _Run:
    """One run of `encode_rows`, from an existing journal to the published pairs."""

    def __init__(
        self, job: EncodeJob, open_source: Callable[[RowPosition], RowSource], output_prefix: str, options: EncodeOptions
    ) -> None:
        self.job, self.options, self.prefix = job, options, output_prefix
        self.encoder = Encoder(job)
        self.journal_path = Path(f"{output_prefix}.progress.json")
        self.bad_path = Path(f"{output_prefix}_bad_rows.jsonl")
        self.outputs = [(f"{output_prefix}_{name}", dtype) for name, dtype in self.encoder.outputs()]
        identity = open_source(RowPosition()).identity()
        self.key = {"job": job.key(), "tokenizer": self.encoder.tokenizer.fingerprint(), "input": identity}
        # A round trip through JSON, so that it compares equal with the key in a journal.
        self.key = json.loads(json.dumps(self.key))
        self.journal = self._read_journal()
        self.summary = EncodeSummary(**(self.journal or {}).get("summary", {}))
        self.summary.resumed_at, self.summary.seconds = self.summary.documents, 0.0
        self.source = open_source(RowPosition(*(self.journal or {}).get("place", ())))

    def _read_journal(self) -> dict[str, Any] | None:
        """The journal of an interrupted run of the same job on the same input; any other is discarded."""
        try:
            journal = read_json(self.journal_path)
            if journal["key"] == self.key and len(journal["writers"]) == len(self.outputs):
                return dict(journal)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            pass
        log.warning("%s belongs to another job or input: starting from the beginning", self.journal_path)
        self.journal_path.unlink(missing_ok=True)
        return None

    def run(self) -> EncodeSummary:
        """Read, encode, write, publish."""
        started = time.monotonic()
        for line in self.encoder.tokenizer.remarks(self.job.append_eod):
            log.warning(line)
        if self.journal is None or not self.journal["complete"]:
            if self.journal is not None:
                log.info("resuming an interrupted run after document %d", self.summary.documents)
            self._write_parts()
        self._publish()
        self.summary.seconds = time.monotonic() - started
        return self.summary

    def _write_parts(self) -> None:
        states = self.journal["writers"] if self.journal else [None] * len(self.outputs)
        bad_length = self.journal["bad_bytes"] if self.journal else 0
        with contextlib.ExitStack() as stack:
            self.writers = []
            for (prefix, dtype), state in zip(self.outputs, states, strict=True):
                self.writers.append(PartialPair(prefix, dtype, state, self.job.cached))
                stack.callback(self.writers[-1].close)
            self.bad = PartialFile(Path(f"{self.bad_path}.part"), bad_length)
            self.bad_bytes = bad_length
            stack.callback(self.bad.close)
            try:
                self._encode_all()
            except BaseException:
                if not self.journal_path.exists():  # nothing to resume from
                    self._discard()
                raise

    def _encode_all(self) -> None:
        position = RowPosition()
        committed = time.monotonic()
        batches = in_batches(self.source)
        workers = self.options.workers
        results = encode_here(self.encoder, batches) if workers <= 1 else encode_in_pool(self.job, batches, workers)
        progress = Progress(self.source.total_bytes, self.options.log_interval)
        with contextlib.closing(progress), contextlib.closing(results):  # type: ignore[type-var]  # generators can be closed
            for rows, encoded in results:
                self._add(rows, encoded)
                position = rows[-1].position
                new_documents = self.summary.documents - self.summary.resumed_at
                progress.update(new_documents, self.summary.bytes, self.writers[0].tokens, self.source.done_bytes)
                if time.monotonic() - committed >= self.options.commit_seconds:
                    self._commit(position, complete=False)
                    committed = time.monotonic()
        names = [name for name, _ in self.encoder.outputs()]
        self.summary.tokens = {name: writer.tokens for name, writer in zip(names, self.writers, strict=True)}
        for name, tokens in self.summary.tokens.items():
            if tokens == 0:
                why = f"{self.summary.documents} documents were read, none has text for {name}"
                raise DataError("the corpus is empty", where=self.prefix, why=why)
        if self.job.mask_before and self.summary.unmarked == self.summary.documents - self.summary.empty - self.summary.bad:
            raise DataError(
                f"no document contains the marker {','.join(map(str, self.job.mask_before))}",
                where=self.prefix,
                why="without it nothing of a document is masked, and the labels would be the tokens themselves",
                hint="the ids must be those that this tokenizer gives the marker inside a text; without masks use preprocess_data.py",
            )
        self._commit(position, complete=True)

    def _add(self, rows: Sequence[Row], encoded: Encoded) -> None:
        for row, documents in zip(rows, encoded, strict=True):
            self.summary.documents += 1
            self.summary.bytes += len(row)
            if isinstance(documents, BadRow):
                self._set_aside(row, documents)
                continue
            self.summary.empty += all(tokens is None or len(tokens) == 0 for tokens in documents)
            for writer, tokens in zip(self.writers, documents, strict=True):
                writer.add(tokens)
            if self.job.mask_before and is_unmarked(documents[-1]):
                self.summary.unmarked += 1
                self.summary.first_unmarked = self.summary.first_unmarked or row.where

    def _set_aside(self, row: Row, bad: BadRow) -> None:
        self.summary.bad += 1
        limit = self.options.bad_row_limit
        if self.summary.bad > limit:
            error = bad.error()
            counted = f" (bad row {self.summary.bad}, {limit} are allowed)" if limit else ""
            hint = f"{error.hint}; or set bad rows aside: --bad-row-limit N" if error.hint else "--bad-row-limit N"
            raise DataError(error.what + counted, where=error.where, why=error.why, hint=hint)
        data = row.data if row.fields is None else b"\n".join(row.fields)
        text = data.decode("utf-8", errors="backslashreplace")
        line = json.dumps({"where": bad.where, "what": bad.what, "why": bad.why, "data": text}).encode() + b"\n"
        self.bad.write(line)
        self.bad_bytes += len(line)

    def _commit(self, position: RowPosition, complete: bool) -> None:
        """Sync the partial files first, then the journal that refers to them."""
        self.bad.commit()
        journal = {
            "key": self.key,
            "place": list(position),
            "writers": [writer.commit() for writer in self.writers],
            "bad_bytes": self.bad_bytes,
            "summary": asdict(self.summary),
            "complete": complete,
        }
        write_json(self.journal_path, journal)

    def _discard(self) -> None:
        for writer in self.writers:
            writer.discard()
        self.bad.path.unlink(missing_ok=True)
        self.journal_path.unlink(missing_ok=True)

    def _publish(self) -> None:
        """Publish; every step is repeatable after a kill, and the journal is removed last."""
        for prefix, dtype in self.outputs:
            publish_pair(prefix, dtype, self.job.cached)
            name = prefix.removeprefix(f"{self.prefix}_")
            facts = {"documents": self.summary.documents, "empty": self.summary.empty, "bad_rows": self.summary.bad}
            facts |= {"tokens": self.summary.tokens[name], "append_eod": self.job.append_eod}
            write_meta(prefix, describe(self.encoder.tokenizer), **facts)
            if self.options.checksums:
                write_checksums(prefix)
        partial_bad_rows = Path(f"{self.bad_path}.part")
        if partial_bad_rows.exists():
            if self.summary.bad:
                partial_bad_rows.replace(self.bad_path)
            else:
                self.bad_path.unlink(missing_ok=True)
                partial_bad_rows.unlink()
        self.journal_path.unlink(missing_ok=True)
        for prefix in (self.prefix, *(prefix for prefix, _ in self.outputs)):
            remove_partial_files(prefix)
