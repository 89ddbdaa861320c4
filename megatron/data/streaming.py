"""Training on raw text without token files: rows are read and tokenised on the fly.

Samples are windows of `seq_length + 1` tokens, overlapping by one, over the documents in input order (each ended
by the eod). The interface is that of any dataset, so `MicroBatchLoader` works with it, but samples must be read in order. Every
data-parallel rank tokenises the complete stream and takes its slice, so a sample depends only on its number, whatever
the number of ranks. (Each rank pays for all the tokenising; token files avoid that.) The cursor is the document and
token at which a sample begins.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.datasets import Sample, TokenDataset
from megatron.data.encoder import in_batches
from megatron.data.readers import RowReader, expand_inputs
from megatron.data.rows import RowPosition, Row, row_texts
from megatron.data.tokenizer_base import Tokenizer
from megatron.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamCursor:
    """The position at which a sample begins.

    Attributes:
        sample: its global number.
        epoch: completed passes over the input.
        place: the row after which its first document is read, as (input, rows, offset); see `rows.RowPosition`.
        token: tokens of that document before the sample, its eod included.
    """

    sample: int = 0
    epoch: int = 0
    place: tuple[int, int, int] = (0, 0, 0)
    token: int = 0


@dataclass
class _Document:
    """Unused tokens and their origin."""

    tokens: NDArray[np.int64]
    used: int
    epoch: int
    before: RowPosition


class StreamDataset(TokenDataset):
    """Samples of a stream of text, read in order.

    Args:
        open_rows: returns the rows after a position; called for each epoch and at resume.
        tokenizer: tokenises the rows.
        seq_length: tokens a sample predicts.
        size: total number of samples.
        start: the cursor of the checkpoint.
        key: the field of a record that holds the text.
        vocab_size: entries of the embedding; a larger tokenizer is refused.
        repeat: start over (with a warning) when the input ends before `size` samples.
        window: recent samples to keep for readers that lag a little; only these have cursors.

    Raises:
        DataError: a size is out of range or the tokenizer is too large; in `sample`: the sample is no longer in the window,
            the stream has ended, or a row cannot be read.
    """

    def __init__(
        self,
        open_rows: Callable[[RowPosition], Iterator[Row]],
        tokenizer: Tokenizer,
        seq_length: int,
        size: int,
        start: StreamCursor | None = None,
        key: str = "text",
        vocab_size: int | None = None,
        repeat: bool = True,
        window: int = 8192,
    ) -> None:
        if vocab_size is not None and tokenizer.text_vocab_size > vocab_size:
            raise DataError(
                f"the tokenizer has {tokenizer.text_vocab_size} entries and the model {vocab_size}",
                why="the last ones do not fit",
            )
        if seq_length < 1 or size < 0 or window < 1:
            raise DataError(f"no stream of {size} samples of {seq_length} tokens with a window of {window}", why="out of range")
        self.open_rows, self.tokenizer, self.seq_length, self.size = open_rows, tokenizer, seq_length, size
        self.key, self.repeat, self.window = key, repeat, window
        start = start or StreamCursor()
        self._next = start.sample
        self._epoch = start.epoch
        self._documents = self._read(start)
        self._open: list[_Document] = []
        self._buffered = 0
        self._window_samples: OrderedDict[int, tuple[NDArray[np.int32], StreamCursor]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.size

    def sample(self, index: int) -> Sample:
        """Sample `index`, at most `window` before the latest sample read."""
        with self._lock:
            self._make_until(index)
            return Sample(self._window_samples[index][0].astype(np.int64))

    def cursor(self, index: int) -> dict[str, Any]:
        """The cursor of sample `index`, for a checkpoint; `index` may be one past the last sample."""
        with self._lock:
            if index == self._next:
                self._fill(1, needed=False)
                return asdict(self._cursor_now())
            self._make_until(index)
            return asdict(self._window_samples[index][1])

    @staticmethod
    def cursor_from(saved: dict[str, Any]) -> StreamCursor:
        """The inverse of `cursor`."""
        first, rows, offset = saved["place"]
        return StreamCursor(saved["sample"], saved["epoch"], (first, rows, offset), saved["token"])

    def _make_until(self, index: int) -> None:
        if not 0 <= index < self.size:
            raise DataError(f"sample {index} does not exist", why=f"the stream was opened for {self.size} samples")
        while self._next <= index:
            self._make_one()
        if index not in self._window_samples:
            raise DataError(
                f"sample {index} of the stream is no longer available",
                why=f"a stream is read in order; {len(self._window_samples)} samples before {self._next} are kept",
                hint="open the stream at the cursor of the checkpoint",
            )

    def _make_one(self) -> None:
        width = self.seq_length + 1
        self._fill(width, needed=True)
        cursor, tokens, at = self._cursor_now(), np.empty(width, dtype=np.int32), 0
        for document in self._open:
            chunk = document.tokens[document.used : document.used + width - at]
            tokens[at : at + len(chunk)] = chunk
            at += len(chunk)
        self._use(self.seq_length)  # the last token is the first of the next sample
        self._window_samples[self._next] = (tokens, cursor)
        self._next += 1
        while len(self._window_samples) > self.window:
            self._window_samples.popitem(last=False)

    def _cursor_now(self) -> StreamCursor:
        if not self._open:
            return StreamCursor(self._next, self._epoch)
        first = self._open[0]
        return StreamCursor(self._next, first.epoch, (*first.before,), first.used)

    def _fill(self, count: int, needed: bool) -> None:
        """Buffer at least `count` tokens, if the stream has them."""
        while self._buffered < count:
            document = next(self._documents, None)
            if document is None:
                if needed:
                    raise DataError(
                        f"the stream ended after {self._next} samples",
                        why=f"{self.size} are needed and it is not repeated",
                        hint="lower train_iters, or let it start over",
                    )
                return
            self._open.append(document)
            self._buffered += len(document.tokens) - document.used

    def _use(self, count: int) -> None:
        self._buffered -= count
        while count:
            first = self._open[0]
            take = min(count, len(first.tokens) - first.used)
            first.used += take
            count -= take
            if first.used == len(first.tokens):
                del self._open[0]

    def _read(self, start: StreamCursor) -> Iterator[_Document]:
        """Documents with tokens from the cursor on, epoch after epoch."""
        position, used = RowPosition(*start.place), start.token
        while True:
            has_text = False
            previous = position
            for rows in in_batches(self.open_rows(position)):
                for row, ids in zip(rows, self._tokens(rows), strict=True):
                    if len(ids) > used:
                        has_text = True
                        yield _Document(ids, used, self._epoch, previous)
                    used = 0 if len(ids) else used
                    previous = row.position
            if not self.repeat:
                return
            if not has_text and position == RowPosition():
                raise DataError("the stream holds no text", why="it was read to its end")
            self._epoch += 1
            log.warning("the stream of text has ended; it starts over (epoch %d)", self._epoch + 1)
            position, used = RowPosition(), 0

    def _tokens(self, rows: Sequence[Row]) -> list[NDArray[np.int64]]:
        texts = [row_texts(row, [self.key])[0] for row in rows]
        ids = iter(self.tokenizer.tokenize_batch([text for text in texts if text]))
        eod, empty = self.tokenizer.eod, np.zeros(0, np.int64)
        return [np.array([*next(ids), eod], dtype=np.int64) if text else empty for text in texts]


def open_stream_dataset(
    inputs: Sequence[str],
    tokenizer: Tokenizer,
    seq_length: int,
    size: int,
    saved: dict[str, Any] | None = None,
    key: str = "text",
    vocab_size: int | None = None,
    repeat: bool = True,
) -> StreamDataset:
    """Open a stream of files, folders or `hf:` datasets (`readers.expand_inputs`), at the saved cursor.

    Args:
        inputs: see `readers.expand_inputs`.
        saved: the cursor of a checkpoint; None: from the beginning.

    The other arguments are those of `StreamDataset`.
    """
    sources = expand_inputs(inputs)
    for line in tokenizer.remarks(append_eod=True):
        log.warning(line)
    start = None if saved is None else StreamDataset.cursor_from(saved)
    return StreamDataset(
        lambda position: iter(RowReader(sources, [key], position)),
        tokenizer, seq_length, size, start, key, vocab_size, repeat,
    )  # fmt: skip
