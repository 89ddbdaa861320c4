"""Perplexity of a token stream, by non-overlapping blocks or a sliding window (arXiv 2108.12409).

All N tokens of the stream are scored exactly once, for any length and stride; token i is predicted from the
tokens before it, the very first from `first` (the end-of-document token). With length l and stride S each pass reads up to
l - S tokens of context and S new ones, and only the new ones are scored. S = l is the non-overlapping evaluation: no state
and no token crosses a block. It works for every mixer, since each pass starts from an empty state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from megatron.errors import ConfigError, DataError
from megatron.layers.base import Context
from megatron.model.lm import LanguageModel, embed, run_blocks
from megatron.ops.precision import in_accumulation_dtype


@dataclass(frozen=True)
class Window:
    """One pass over the targets `start .. stop`, which scores those from `new` on."""

    start: int
    new: int
    stop: int


def windows(count: int, length: int, stride: int) -> Iterator[Window]:
    """The ceil(count / stride) passes over a stream of `count` targets; a pass reads at most `length` tokens.

    Raises:
        ConfigError: the stride is not between 1 and the length.
    """
    if not 1 <= stride <= length:
        raise ConfigError(f"a stride of {stride} does not fit a length of {length}", hint="1 <= stride <= length")
    for new in range(0, count, stride):
        yield Window(max(0, new - (length - stride)), new, min(new + stride, count))


@dataclass(frozen=True)
class Score:
    """The result of one evaluation.

    Attributes:
        length: maximum number of tokens per pass.
        stride: tokens scored per pass.
        tokens: scored tokens.
        passes: number of passes.
        nll: summed negative log-likelihood, in nats.
        seconds: duration.
    """

    length: int
    stride: int
    tokens: int
    passes: int
    nll: float
    seconds: float

    @property
    def perplexity(self) -> float:
        """Perplexity per token of the stream."""
        return math.exp(self.nll / self.tokens)

    def report(self, words: int | None = None, size: int | None = None) -> dict[str, Any]:
        """A JSON object; given words and bytes of the text, also perplexity per word and bits per byte."""
        values: dict[str, Any] = {
            "length": self.length,
            "stride": self.stride,
            "tokens": self.tokens,
            "passes": self.passes,
            "nll": self.nll,
            "perplexity": self.perplexity,
            "seconds": round(self.seconds, 2),
        }
        if words:
            values["word_perplexity"] = _exp(self.nll / words)
        if size:
            values["bits_per_byte"] = self.nll / math.log(2) / size
        return values


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _groups(all_windows: Iterator[Window], tokens_per_batch: int) -> Iterator[list[Window]]:
    """Batches of passes with equal shape, as large as fits."""
    batch: list[Window] = []
    for window in all_windows:
        shape = (window.stop - window.start, window.stop - window.new)
        if batch and (
            shape != (batch[0].stop - batch[0].start, batch[0].stop - batch[0].new)
            or (len(batch) + 1) * shape[0] > tokens_per_batch
        ):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _nll(model: LanguageModel, inputs: Tensor, targets: Tensor, backend: str, vocab_size: int | None) -> float:
    """Summed -log p of `targets [b, t]`, the last t positions of `inputs [b, s]`, over the first `vocab_size` ids."""
    ctx = Context(backend=backend)
    inner = model.model
    x, _ = embed(inner.embed_tokens, inner.embed_tokens(inputs), ctx, None)
    x, _ = run_blocks(inner.layers, x, ctx, None)
    rows = inner.final_norm(x[:, -targets.shape[1] :]).flatten(0, 1)
    total = 0.0
    for hidden, chunk_targets in zip(rows.split(2048), targets.flatten().split(2048), strict=True):
        logits = model.lm_head(hidden)[..., :vocab_size]
        total += F.cross_entropy(in_accumulation_dtype(logits), chunk_targets, reduction="none").double().sum().item()
    return total


def check_ids(tokens: NDArray[Any], vocab_size: int | None) -> None:
    """Refuse tokens of another tokenizer.

    Raises:
        DataError: an id is not below `vocab_size`.
    """
    if vocab_size is not None and int(tokens.max()) >= vocab_size:
        raise DataError(
            f"token id {int(tokens.max())} is outside the tokenizer's {vocab_size} ids",
            why="the data were made with another tokenizer",
            hint="check tokenizer_type and vocab_file against the ones used for data_path",
        )


@torch.inference_mode()
def score(
    model: LanguageModel,
    stream: NDArray[Any] | Sequence[int],
    first: int,
    length: int,
    stride: int | None = None,
    *,
    tokens_per_batch: int = 8192,
    backend: str = "auto",
    vocab_size: int | None = None,
) -> Score:
    """Score every token of `stream` once.

    Args:
        model: the model, in evaluation mode.
        stream: token ids.
        first: id of the token before the stream.
        length: maximum number of tokens per pass.
        stride: tokens scored per pass; None is `length`, the non-overlapping evaluation.
        tokens_per_batch: maximum number of tokens in a batch of passes.
        backend: see `Context`.
        vocab_size: true vocabulary size; padding rows get no probability. None for all rows.

    Raises:
        ConfigError: the stream is empty, or the stride is invalid.
        DataError: a token is outside `vocab_size`.
        ValueError: the text is too long for the model (learned positions).
    """
    tokens = np.asarray(stream)
    if not len(tokens):
        raise ConfigError("there is no token to score")
    check_ids(tokens, vocab_size)
    stride = stride or length
    device = next(model.parameters()).device
    started, total, passes = time.monotonic(), 0.0, 0
    for batch in _groups(windows(len(tokens), length, stride), tokens_per_batch):
        inputs = np.stack([_preceding(tokens, w, first) for w in batch]).astype(np.int64)
        targets = np.stack([tokens[w.new : w.stop] for w in batch]).astype(np.int64)
        total += _nll(model, torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device), backend, vocab_size)
        passes += len(batch)
    return Score(length, stride, len(tokens), passes, total, time.monotonic() - started)


def _preceding(tokens: NDArray[Any], window: Window, first: int) -> NDArray[Any]:
    """The inputs of a window: the stream shifted right by one."""
    if window.start:
        return tokens[window.start - 1 : window.stop - 1]
    return np.concatenate([[first], tokens[: window.stop - 1]])
