"""Reads long texts in chunks with the recurrent state, so that 64k tokens need no more memory than a chunk and the state.

`ChunkedPrompts` reads a batch of prompts once; from its state it then scores any number of answers and generates one.
`token_losses` scores every token of long documents. Mixers guarantee that chunks give what one pass gives
(`layers/base.py`, clause 3).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.generation.sample import NextLogits
from megatron.layers.base import Context, State, input_names, inputs_of
from megatron.model.lm import LanguageModel, embed, run_blocks
from megatron.ops.precision import in_accumulation_dtype

CHUNK = 2048
_SCORES = 1 << 25  # attention scores per head in a pass: batch x chunk x tokens read


class PromptReader(NextLogits, Protocol):
    """A batch of prompts that are read once, scored and continued."""

    def score(self, answers: Tensor) -> tuple[Tensor, Tensor]:
        """(log-probability, is the likeliest token), both [b, t], of answers [b, t] after the prompts."""


def chunk_length(batch: int, length: int) -> int:
    """Tokens per pass: at most `CHUNK`, and fewer where attention over the complete text would not fit into memory."""
    return max(32, min(CHUNK, _SCORES // max(1, batch * length)))


class ChunkedPrompts:
    """A batch of prompts of one length before a model on this device.

    Args:
        model: in evaluation mode.
        prompts: [b, s] ids.
        vocab_size: true vocabulary size; padding rows are never chosen.
        backend: see `Context`.
        chunk: tokens per pass; None: as `chunk_length` says.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Tensor,
        vocab_size: int | None = None,
        backend: str = "auto",
        chunk: int | None = None,
    ) -> None:
        self._model, self._vocab_size, self._backend = model, vocab_size, backend
        self._prompts = prompts.to(next(model.parameters()).device)
        self._chunk = chunk or chunk_length(*prompts.shape)
        self._logits: Tensor | None = None
        self._state: list[State] = []

    @torch.inference_mode()
    def prefill(self) -> Tensor:
        """Logits [b, n] after the prompts; reads them at the first call only."""
        if self._logits is None:
            passes = _hidden_states(self._model, self._prompts, self._chunk, self._backend, prefix=True)
            x, self._state = deque(passes, maxlen=1).pop()
            self._logits = self._head(x[:, -1])
        return self._logits

    @torch.inference_mode()
    def score(self, answers: Tensor) -> tuple[Tensor, Tensor]:
        """(log-probability, is the likeliest token), both [b, t], of answers [b, t] after the prompts."""
        logits = self.prefill()[:, None]
        answers = answers.to(logits.device)
        if answers.shape[1] > 1:
            rest, _ = self._model(answers[:, :-1], Context(backend=self._backend), self._state)
            logits = torch.cat([logits, in_accumulation_dtype(rest[..., : self._vocab_size])], 1)
        scores = logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0]
        return scores.cpu(), (logits.argmax(-1) == answers).cpu()

    @torch.inference_mode()
    def advance(self, tokens: Tensor) -> Tensor:
        """Logits [b, n] after one more token [b] per row; ends scoring, as the state moves on."""
        logits, self._state = self._model.step(tokens, self._state, Context(backend=self._backend))
        self._logits = in_accumulation_dtype(logits[:, : self._vocab_size])
        return self._logits

    def _head(self, x: Tensor) -> Tensor:
        logits = self._model.lm_head(self._model.model.final_norm(x))
        return in_accumulation_dtype(logits[..., : self._vocab_size])


@torch.inference_mode()
def token_losses(
    model: LanguageModel,
    inputs: Tensor,
    targets: Tensor,
    *,
    vocab_size: int | None = None,
    backend: str = "auto",
    chunk: int | None = None,
) -> Tensor:
    """-log p [b, s] in fp64 of `targets [b, s]`, each from the `inputs [b, s]` up to its place, read in chunks.

    Layers of prefix (JRT) models read causally: a prefix would see the targets.
    """
    device, inner = next(model.parameters()).device, model.model
    losses, start = [], 0
    for x, _ in _hidden_states(model, inputs.to(device), chunk or chunk_length(*inputs.shape), backend, prefix=False):
        labels = targets[:, start : start + x.shape[1]].to(device)
        start += x.shape[1]
        for rows, row_labels in zip(x.split(512, 1), labels.split(512, 1), strict=True):
            logits = in_accumulation_dtype(model.lm_head(inner.final_norm(rows))[..., :vocab_size])
            losses.append(F.cross_entropy(logits.transpose(1, 2), row_labels, reduction="none").double().cpu())
    return torch.cat(losses, 1)


def _hidden_states(
    model: LanguageModel, tokens: Tensor, chunk: int, backend: str, *, prefix: bool
) -> Iterator[tuple[Tensor, list[State]]]:
    """Of each chunk of `tokens [b, s]` the last block's output [b, c, d], and the state after it."""
    inner, state = model.model, model.init_state(len(tokens))
    for part, ctx in _passes(model, tokens, chunk, backend, prefix=prefix):
        x, tail = embed(inner.embed_tokens, inner.embed_tokens(part), ctx, state)
        x, after = run_blocks(inner.layers, x, ctx, state)
        assert after is not None  # a state was given
        state = after + tail
        yield x, state


def _passes(
    model: LanguageModel, tokens: Tensor, chunk: int, backend: str, *, prefix: bool
) -> Iterator[tuple[Tensor, Context]]:
    """The chunks of `tokens [b, s]` with their contexts; the first one holds all of a prefix model's prefix."""
    mixers, length = [block.token_mixer for block in model.model.blocks()], tokens.shape[1]
    values: dict[str, int] = {}
    if "prefix_length" in input_names(mixers):
        option = model.config.layer_options.get("jrt", {}).get("prefix_length", 0)
        values = {"prefix_length": min(option, length) if prefix else 0}
    ctx = Context(backend=backend, inputs=inputs_of(mixers, values))
    first = max(chunk, values.get("prefix_length", 0))
    for part in [tokens[:, :first], *(tokens[:, first:].split(chunk, 1) if length > first else ())]:
        yield part, ctx
