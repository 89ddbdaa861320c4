"""The face of all tokenizers, so that data, generation and export never ask which kind they hold.

A tokenizer knows its files and their fingerprint, because tokens mean nothing without the exact tokenizer that made them.

Some tokenizers put special tokens around a text (their template). Where the text stands decides which of them it gets:

    tokenize          a document of a corpus: all of them, as GPT-NeoX writes it
    tokenize_prompt   a text to be continued: those in front; one behind it would end it
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
    """The ids that a tokenizer puts before and after every document."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        name: NeoX's `tokenizer_type`.
        template: what `tokenize` puts around a text.
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
        """The largest id that encoded text can hold + 1: `vocab_size`, less a padding token that the files do not have."""
        return self.vocab_size

    @property
    @abstractmethod
    def eod(self) -> int:
        """Id that ends a document; a DataError if the tokenizer has none."""

    @property
    @abstractmethod
    def pad(self) -> int:
        """Id to fill short rows with; `eod` where there is no id of its own."""

    @property
    def bos(self) -> int | None:
        """Id that starts a text, None if the tokenizer has none."""
        return self.template.before[0] if self.template.before else None

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Ids of `text` as a document, the template's included; no end-of-document is added beside them."""

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens spelled out where the library can."""

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`tokenize` for several texts, in order; faster where the library has threads."""
        return [self.tokenize(text) for text in texts]

    def tokenize_prompt(self, text: str) -> list[int]:
        """Ids of `text` to be continued: the template's start stays, its end does not."""
        ids = self.tokenize(text)
        return ids[: len(ids) - len(self.template.after)]

    def tokenize_piece(self, text: str) -> list[int]:
        """Ids of `text` alone, to stand between other tokens."""
        return self.tokenize_prompt(text)[len(self.template.before) :]

    def remarks(self, append_eod: bool = False) -> list[str]:
        """What a person should know of it before tokens are written, a line each.

        Args:
            append_eod: whether the caller ends each document by `eod`.
        """
        before, after = (self._spelled(ids) for ids in (self.template.before, self.template.after))
        ends = [f"{before} at the start" * bool(before), f"{after} at the end" * bool(after)]
        said = " and ".join(end for end in ends if end)
        if not said:
            return []
        line = f"the tokenizer's template adds {said} of each document"
        if append_eod:
            which = "a second" if self.template.after[-1:] == (self.eod,) else "the end-of-document token"
            line += f"; {which} {self._spelled([self.eod])} is appended behind it"
        return [line]

    def _spelled(self, ids: Sequence[int]) -> str:
        return " ".join(self.detokenize([i]) for i in ids)

    def files(self) -> list[Path]:
        """The files it was read from, which an export must carry along."""
        return list(self._files)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over the kind, the number of tokens and the content of the files, independent of where they lie."""
        parts = [self.name, str(self._token_count()), *(f"{path.name}:{sha256_of(path)}" for path in self._files)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _token_count(self) -> int:
        """Tokens in the vocabulary; `vocab_size` unless its ids have gaps."""
        return self.vocab_size


def unreadable(path: Path, kind: str, error: BaseException) -> DataError:
    """The error for a tokenizer file that its library cannot read."""
    return DataError(
        f"the file is not {kind}",
        where=str(path),
        why=str(error),
        hint="vocab_file and tokenizer_type must fit together",
    )
