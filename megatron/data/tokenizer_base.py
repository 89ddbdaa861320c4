"""The face of all tokenizers, so that data, generation and export never ask which kind they hold.

A tokenizer knows its files and their fingerprint, because tokens mean nothing without the exact tokenizer that made them.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from megatron.errors import DataError
from megatron.files import sha256_of

EOD_TEXT = "<|endoftext|>"
PAD_TEXT = "<|padding|>"


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        name: NeoX's `tokenizer_type`.
    """

    name: str

    def __init__(self, files: Sequence[Path] = ()) -> None:
        self._files = list(files)

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, added special tokens included, padding for the hardware not."""

    @property
    @abstractmethod
    def eod(self) -> int:
        """Id that ends a document; a DataError if the tokenizer has none."""

    @property
    @abstractmethod
    def pad(self) -> int:
        """Id to fill short rows with; `eod` where there is no id of its own."""

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Ids of `text`; no end-of-document is added."""

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens spelled out where the library can."""

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`tokenize` for several texts, in order; faster where the library has threads."""
        return [self.tokenize(text) for text in texts]

    def files(self) -> list[Path]:
        """The files it was read from, which an export must carry along."""
        return list(self._files)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over the kind, the vocabulary size and the content of the files, independent of where they lie."""
        parts = [self.name, str(self.vocab_size), *(f"{path.name}:{sha256_of(path)}" for path in self._files)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def unreadable(path: Path, kind: str, error: Exception) -> DataError:
    """The error for a tokenizer file that its library cannot read."""
    return DataError(
        f"the file is not {kind}",
        where=str(path),
        why=str(error),
        hint="vocab_file and tokenizer_type must fit together",
    )
