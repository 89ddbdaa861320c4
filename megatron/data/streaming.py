"""Training on text that was never made into token files: rows are read and tokenised as the steps ask for them.

Samples are windows of `seq_length + 1` tokens, overlapping by one, cut from the documents in the order they come (each ended
by the eod). `MicroBatchLoader` reads it as any dataset, but only forward. Every data-parallel
rank tokenises the whole stream and takes its part: what a step sees then depends on nothing but the sample number, whatever
the number of ranks. (That costs each rank all the tokenising; token files do not.) The cursor says at which document and
token a sample begins.
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
from megatron.data.rows import Place, Row, row_texts
from megatron.data.tokenizer_base import Tokenizer
from megatron.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamCursor:
    """Where a sample begins.

    Attributes:
        sample: its global number.
        epoch: how often the input was read to its end before.
        place: behind which row of the input its first document is read, as (input, rows, offset).
        token: tokens of that document (the eod counts) before the sample.
    """

    sample: int = 0
    epoch: int = 0
    place: tuple[int, int, int] = (0, 0, 0)
    token: int = 0


@dataclass
class _Document:
    """Tokens that are not yet used, and where they came from."""

    tokens: NDArray[np.int64]
    used: int
    epoch: int
    before: Place


class StreamDataset(TokenDataset):
    """Samples of a stream of text, to be read forward.

    Args:
        open_rows: gives the rows behind a place; called again for each epoch and at resume.
        tokenizer: what makes the tokens.
        seq_length: tokens a sample predicts.
        size: samples in all; the length of the dataset.
        start: the cursor of the checkpoint.
        key: the field of a record that holds the text.
        vocab_size: entries of the embedding; a tokenizer with more is refused.
        repeat: start over (with a warning) when the input ends before `size` samples.
        window: samples kept for readers that are a little behind; cursors are known for these only.

    Raises:
        DataError: as above; `sample`: the stream is passed, has ended, or a row cannot be read.
    """

    def __init__(
        self,
        open_rows: Callable[[Place], Iterator[Row]],
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
        self._have = 0
        self._made: OrderedDict[int, tuple[NDArray[np.int32], StreamCursor]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.size

    def sample(self, index: int) -> Sample:
        """Sample `index`, which may not lie more than `window` before the latest one that was read."""
        with self._lock:
            self._make_until(index)
            return Sample(self._made[index][0].astype(np.int64))

    def cursor(self, index: int) -> dict[str, Any]:
        """The cursor of sample `index`, for a checkpoint; `index` may be one behind the last sample."""
        with self._lock:
            if index == self._next:
                self._fill(1, needed=False)
                return asdict(self._cursor_now())
            self._make_until(index)
            return asdict(self._made[index][1])

    @staticmethod
    def cursor_from(saved: dict[str, Any]) -> StreamCursor:
        """The cursor that `cursor` (and JSON) made of it."""
        first, rows, offset = saved["place"]
        return StreamCursor(saved["sample"], saved["epoch"], (first, rows, offset), saved["token"])

    def _make_until(self, index: int) -> None:
        if not 0 <= index < self.size:
            raise DataError(f"sample {index} does not exist", why=f"the stream was opened for {self.size} samples")
        while self._next <= index:
            self._make_one()
        if index not in self._made:
            raise DataError(
                f"sample {index} of the stream is passed",
                why=f"it is read forward; {len(self._made)} samples before {self._next} are kept",
                hint="open the stream at the cursor of the checkpoint",
            )

    def _make_one(self) -> None:
        width = self.seq_length + 1
        self._fill(width, needed=True)
        cursor, tokens, at = self._cursor_now(), np.empty(width, dtype=np.int32), 0
        for document in self._open:
            piece = document.tokens[document.used : document.used + width - at]
            tokens[at : at + len(piece)] = piece
            at += len(piece)
        self._use(self.seq_length)  # the last token is the first of the next sample
        self._made[self._next] = (tokens, cursor)
        self._next += 1
        while len(self._made) > self.window:
            self._made.popitem(last=False)

    def _cursor_now(self) -> StreamCursor:
        if not self._open:
            return StreamCursor(self._next, self._epoch)
        first = self._open[0]
        return StreamCursor(self._next, first.epoch, (*first.before,), first.used)

    def _fill(self, count: int, needed: bool) -> None:
        """Hold at least `count` tokens, if the stream has them."""
        while self._have < count:
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
            self._have += len(document.tokens) - document.used

    def _use(self, count: int) -> None:
        self._have -= count
        while count:
            first = self._open[0]
            take = min(count, len(first.tokens) - first.used)
            first.used += take
            count -= take
            if first.used == len(first.tokens):
                del self._open[0]

    def _read(self, start: StreamCursor) -> Iterator[_Document]:
        """Documents with tokens from the cursor on, epoch after epoch."""
        place, used = Place(*start.place), start.token
        while True:
            found = False
            before = place
            for rows in in_batches(self.open_rows(place)):
                for row, ids in zip(rows, self._tokens(rows), strict=True):
                    if len(ids) > used:
                        found = True
                        yield _Document(ids, used, self._epoch, before)
                    used = 0 if len(ids) else used
                    before = row.place
            if not self.repeat:
                return
            if not found and place == Place():
                raise DataError("the stream holds no text", why="it was read to its end")
            self._epoch += 1
            log.warning("the stream of text is read to its end; it starts over (epoch %d)", self._epoch + 1)
            place, used = Place(), 0

    def _tokens(self, rows: Sequence[Row]) -> list[NDArray[np.int64]]:
        texts = [row_texts(row, [self.key])[0] for row in rows]
        ids = iter(self.tokenizer.tokenize_batch([text for text in texts if text]))
        end, empty = self.tokenizer.eod, np.zeros(0, np.int64)
        return [np.array([*next(ids), end], dtype=np.int64) if text else empty for text in texts]


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
    """A stream of files, folders or `hf:` datasets (`readers.expand_inputs`), from the saved cursor on."""
    sources = expand_inputs(inputs)
    for line in tokenizer.remarks(append_eod=True):
        log.warning(line)
    start = None if saved is None else StreamDataset.cursor_from(saved)
    return StreamDataset(
        lambda place: iter(RowReader(sources, [key], place)),
        tokenizer, seq_length, size, start, key, vocab_size, repeat,
    )  # fmt: skip
