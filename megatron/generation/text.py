"""Text in, text out: unconditional samples, a file of prompts, or a conversation on the terminal, as GPT-NeoX does.

Results are JSON lines {context, text, length, finished, message, duration_seconds}, written one by one, so that an
interrupted run leaves the finished ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from megatron.errors import DataError
from megatron.generation.sample import Sampling, generate
from megatron.model.lm import LanguageModel


class TextTokenizer(Protocol):
    """The part of a tokenizer that generation needs."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    @property
    def eod(self) -> int:
        """Id of the boundary between documents."""

    def tokenize_prompt(self, text: str) -> list[int]:
        """Text -> ids that do not end it."""

    def detokenize(self, ids: Sequence[int]) -> str:
        """Ids -> text."""


class Writer:
    """A model with its tokenizer, ready to continue texts.

    Args:
        model: put into evaluation mode.
        tokenizer: of its data.
        sampling: how tokens are chosen.
        batch_size: prompts that run together (padded on the left; results do not depend on it).
    """

    def __init__(self, model: LanguageModel, tokenizer: TextTokenizer, sampling: Sampling, batch_size: int = 8) -> None:
        self.model, self.tokenizer, self.sampling, self.batch_size = model.eval(), tokenizer, sampling, batch_size

    def continue_texts(self, contexts: Sequence[str]) -> Iterator[dict[str, Any]]:
        """One result per context, in order. `length` counts new tokens; `duration_seconds` is the time of its batch."""
        for first in range(0, len(contexts), self.batch_size):
            yield from self._batch(contexts[first : first + self.batch_size], first)

    def _batch(self, contexts: Sequence[str], first: int) -> Iterator[dict[str, Any]]:
        begun = time.perf_counter()
        prompts = [self._ids(text) for text in contexts]
        results = generate(
            self.model,
            prompts,
            self.sampling,
            eod=self.tokenizer.eod,
            vocab_size=self.tokenizer.vocab_size,
            first_row=first,
        )
        seconds = time.perf_counter() - begun
        for context, result in zip(contexts, results, strict=True):
            record: dict[str, Any] = {
                "context": context,
                "text": self.tokenizer.detokenize(result.tokens),
                "length": len(result.tokens),
                "finished": result.finished,
                "message": result.message,
                "duration_seconds": round(seconds, 4),
            }
            if self.sampling.return_logits:
                record["logits"] = [row.tolist() for row in result.logits]
            yield record

    def _ids(self, text: str) -> list[int]:
        ids, rows = self.tokenizer.tokenize_prompt(text), self.model.config.vocab_size
        if max(ids, default=0) >= rows:
            reason = f"the tokenizer gives the id {max(ids)}, the model has rows for {rows}"
            raise DataError(f"the model does not know a token of the prompt {text[:40]!r}", why=reason)
        return ids


def read_prompts(path: Path, prompt_end: str = "\n") -> list[str]:
    """Prompts of a UTF-8 file, each ended by `prompt_end` and stripped; a bad file raises DataError.

    A blank one between others is kept as "", so that results stand in the order of the file: it continues nothing, as
    `unconditional` does. Only what follows the last end counts as no prompt where it is blank.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError("the prompt file cannot be read", where=str(path), why=error.strerror) from None
    except UnicodeDecodeError as error:
        raise DataError(
            "the prompt file is not UTF-8", where=f"{path}, byte {error.start}", hint="convert it: iconv -t utf-8"
        ) from None
    prompts = [part.strip() for part in text.split(prompt_end)]
    if not prompts[-1]:
        prompts.pop()
    if not any(prompts):
        raise DataError("the prompt file holds no prompt", where=str(path), why=f"prompts are divided by {prompt_end!r}")
    return prompts


def default_output(source: Path) -> Path:
    """Where results of a prompt file go when nothing is said: beside it, `<input>.output.jsonl`."""
    return source.with_name(source.name + ".output.jsonl")


def write_results(results: Iterable[dict[str, Any]], path: Path) -> int:
    """Write one JSON object per line as it comes; returns how many. A folder that is absent raises DataError."""
    count = 0
    try:
        with open(path, "w", encoding="utf-8") as handle:
            for record in results:
                handle.write(json.dumps(record, ensure_ascii=False) + "\n")
                handle.flush()
                count += 1
    except OSError as error:
        raise DataError("the results cannot be written", where=str(path), why=error.strerror) from None
    return count


def unconditional(writer: Writer, num_samples: int) -> Iterator[dict[str, Any]]:
    """`num_samples` texts from nothing: each starts at a document boundary with a seed of its own."""
    return writer.continue_texts([""] * num_samples)


def interactive(writer: Writer, source: IO[str], screen: IO[str], prompt_end: str = "\n") -> int:
    """Read prompts from `source` (lines joined until `prompt_end`), print each continuation; returns how many, ends at EOF."""
    count = 0
    while (context := _ask(source, screen, prompt_end)) is not None:
        if not context.strip():
            screen.write("(a blank context is not continued; end with Ctrl-D)\n")
            continue
        for record in writer.continue_texts([context]):
            note = f"  ({record['message']})" if record["message"] else ""
            screen.write(f"{record['text']}\n[{record['length']} tokens, {record['duration_seconds']:.2f} s]{note}\n")
        count += 1
        if getattr(screen, "lost", None):  # nobody reads along
            break
    screen.write("\n")
    return count


def _ask(source: IO[str], screen: IO[str], prompt_end: str) -> str | None:
    """One prompt, or None at the end of input."""
    screen.write("Context >>> ")
    screen.flush()
    text = ""
    for line in source:
        text += line
        head, separator, _ = text.partition(prompt_end)
        if separator:
            return head
    return text or None
