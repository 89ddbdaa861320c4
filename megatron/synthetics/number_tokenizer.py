"""The tokenizer of data that are not text: a token is its number."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.data.tokenizer_base import Tokenizer
from megatron.errors import DataError


class NumberTokenizer(Tokenizer):
    """`"3 17 5"` <-> [3, 17, 5], for ids below `vocab_size`. No id ends a document; 0 pads."""

    name = "NumberTokenizer"
    vocab_size = 0
    pad = 0

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    @property
    def eod(self) -> int:
        """There is none.

        Raises:
            DataError: always.
        """
        raise DataError("synthetic examples have no end-of-document token", hint="leave eod_mask_loss and reset_*_at_eod off")

    def tokenize(self, text: str) -> list[int]:
        """The numbers of a text.

        Raises:
            DataError: a word is no id.
        """
        words = text.split()
        wrong = next((w for w in words if not w.isdecimal() or int(w) >= self.vocab_size), None)
        if wrong is not None:
            raise DataError(f"'{wrong}' is no token", why=f"tokens are numbers below {self.vocab_size} with spaces between")
        return [int(word) for word in words]

    def detokenize(self, ids: Sequence[int]) -> str:
        """Numbers with spaces between."""
        return " ".join(str(int(i)) for i in ids)
