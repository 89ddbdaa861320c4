"""The interface of all tokenizers.

A tokenizer knows its files and their fingerprint, because token ids mean nothing without the exact tokenizer.

Some tokenizers put special tokens around a text (their template). The use of the text decides which of them are added:

    tokenize          a document of a corpus: all of them, as GPT-NeoX writes it
    tokenize_prompt   a text to be continued: those before it; one after it would end it
    tokenize_piece    a text in the middle of a sequence: none
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.errors import DataError
from megatron.files import sha256_of

EOD_TEXT = "<|endoftext|>"
PAD_TEXT = "<|padding|>"
MOST_IDS = 1 << 24  # of a tokenizer: each is a row of the embedding


@dataclass(frozen=True)
class Template:
    """The special tokens that a tokenizer puts around every document.

    Attributes:
        before: ids before the text.
        after: ids after the text.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        name: NeoX's `tokenizer_type`.
        template: special tokens that `tokenize` adds.
    """

    name: str
    template = Template()

    def __init__(self, files: Sequence[Path] = ()) -> None:
        self._files = list(files)

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The largest id + 1, added special tokens included, padding for the hardware not; ids may have gaps."""

    @property
    def text_vocab_size(self) -> int:
        """The largest id of encoded text + 1: `vocab_size` without a padding token that the files lack."""
        return self.vocab_size

    @property
    @abstractmethod
    def eod(self) -> int:
        """Id that ends a document; raises a DataError if the tokenizer has none."""

    @property
    @abstractmethod
    def pad(self) -> int:
        """Padding id; `eod` if the tokenizer has no padding token."""

    @property
    def bos(self) -> int | None:
        """Id that starts a text, None if the tokenizer has none."""
        return self.template.before[0] if self.template.before else None

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Ids of `text` as a document, including the template's; no end-of-document token is added."""

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of `ids`, with special tokens spelled out if the library can."""

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`tokenize` for several texts, in order; faster with libraries that use threads."""
        return [self.tokenize(text) for text in texts]

    def tokenize_prompt(self, text: str) -> list[int]:
        """Ids of `text` to be continued: with the start of the template, without its end."""
        ids = self.tokenize(text)
        return ids[: len(ids) - len(self.template.after)]

    def tokenize_piece(self, text: str) -> list[int]:
        """Ids of `text` without the template, for use between other tokens."""
        return self.tokenize_prompt(text)[len(self.template.before) :]

    def remarks(self, append_eod: bool = False) -> list[str]:
        """Notes for the user before tokens are written, one line each.

        Args:
            append_eod: the caller ends each document with `eod`.
        """
        before, after = (self._spelled(ids) for ids in (self.template.before, self.template.after))
        ends = [f"{before} at the start" * bool(before), f"{after} at the end" * bool(after)]
        additions = " and ".join(end for end in ends if end)
        if not additions:
            return []
        line = f"the tokenizer's template adds {additions} of each document"
        if append_eod:
            which = "a second" if self.template.after[-1:] == (self.eod,) else "the end-of-document token"
            line += f"; {which} {self._spelled([self.eod])} is appended after it"
        return [line]

    def _spelled(self, ids: Sequence[int]) -> str:
        return " ".join(self.detokenize([i]) for i in ids)

    def files(self) -> list[Path]:
        """The files it was read from, which an export must include."""
        return list(self._files)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over the kind, the number of tokens and the content of the files, independent of their location."""
        lines = [self.name, str(self._token_count()), *(f"{path.name}:{sha256_of(path)}" for path in self._files)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _token_count(self) -> int:
        """Number of tokens in the vocabulary; `vocab_size` unless its ids have gaps."""
        return self.vocab_size


def unreadable(path: Path, kind: str, error: BaseException) -> DataError:
    """The error for a tokenizer file that its library cannot read."""
    return DataError(
        f"the file is not {kind}",
        where=str(path),
        why=str(error),
        hint="vocab_file and tokenizer_type must match",
    )
