"""The tokenizers a configuration can name; the names are NeoX's `tokenizer_type` values.

Libraries are imported by the class that needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron.data.corpus_request import prepare_command
from megatron.data.hf_tokenizers import GPT2BPETokenizer, HFGPT2Tokenizer, HFTokenizer
from megatron.data.tiktoken_file import TiktokenTokenizer
from megatron.data.tokenizer_base import EOD_TEXT, PAD_TEXT, Template, Tokenizer, unreadable
from megatron.errors import DataError

__all__ = [
    "EOD_TEXT",
    "NAMES",
    "PAD_TEXT",
    "CharLevelTokenizer",
    "GPT2BPETokenizer",
    "HFGPT2Tokenizer",
    "HFTokenizer",
    "SPMTokenizer",
    "Template",
    "TiktokenTokenizer",
    "Tokenizer",
    "build_tokenizer",
    "padded_vocab_size",
]


class SPMTokenizer(Tokenizer):
    """A SentencePiece model. The end of a document is the piece `<|endoftext|>`, else the unknown id, as in NeoX.

    A model file has no template, so begin and end pieces are never added.
    """

    name = "SPMTokenizer"

    def __init__(self, vocab_file: Path) -> None:
        super().__init__([vocab_file])
        from sentencepiece import SentencePieceProcessor

        try:
            self._backend = SentencePieceProcessor(model_file=str(vocab_file))
        except (OSError, RuntimeError) as error:
            raise unreadable(vocab_file, "a SentencePiece model", error) from None

    @property
    def vocab_size(self) -> int:
        """Ids, added special tokens included."""
        return int(self._backend.get_piece_size())

    @property
    def eod(self) -> int:
        """Id that ends a document."""
        return int(self._backend.piece_to_id(EOD_TEXT))

    @property
    def pad(self) -> int:
        """Id to fill short rows with."""
        own, padding = int(self._backend.pad_id()), int(self._backend.piece_to_id(PAD_TEXT))
        if own >= 0:
            return own
        return self.eod if padding == self._backend.unk_id() else padding

    def tokenize(self, text: str) -> list[int]:
        """Ids of `text`."""
        return list(self._backend.encode(text))

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of `ids`."""
        return str(self._backend.decode([int(i) for i in ids]))


class CharLevelTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0..255 in a vocabulary of 512; 0 ends a document, 1 pads."""

    name = "CharLevelTokenizer"
    vocab_size = 512
    eod = 0
    pad = 1

    def tokenize(self, text: str) -> list[int]:
        """Ids of `text`."""
        return list(text.encode("utf-8"))

    def detokenize(self, ids: Sequence[int]) -> str:
        """Bytes that are not UTF-8, and ids from 256 on, become U+FFFD."""
        return bytes(i if i < 256 else 0xFF for i in ids).decode("utf-8", errors="replace")


NAMES = (
    "GPT2BPETokenizer",
    "HFTokenizer",
    "HFGPT2Tokenizer",
    "SPMTokenizer",
    "CharLevelTokenizer",
    "TiktokenTokenizer",
)


def build_tokenizer(
    tokenizer_type: str, vocab_file: str | Path | None = None, merge_file: str | Path | None = None
) -> Tokenizer:
    """Build the configured tokenizer (`tokenizer_type` is case-insensitive, as in NeoX).

    Raises:
        DataError: the type is unknown, or a file is missing, unreadable or of another kind.
    """
    kind = tokenizer_type.lower()
    if kind == "charleveltokenizer":
        return CharLevelTokenizer()
    if kind == "hftokenizer":
        return HFTokenizer(_file(vocab_file, "vocab_file", tokenizer_type))
    if kind == "gpt2bpetokenizer":
        merges = _file(merge_file, "merge_file", tokenizer_type)
        return GPT2BPETokenizer(_file(vocab_file, "vocab_file", tokenizer_type), merges)
    if kind == "spmtokenizer":
        return SPMTokenizer(_file(vocab_file, "vocab_file", tokenizer_type))
    if kind == "hfgpt2tokenizer":
        return HFGPT2Tokenizer(_folder(vocab_file))
    if kind == "tiktokentokenizer":
        return TiktokenTokenizer(_file(vocab_file, "vocab_file", tokenizer_type))
    raise DataError(f"tokenizer_type {tokenizer_type!r} is unknown", hint=f"one of {', '.join(NAMES)}")


def padded_vocab_size(size: int, divisible_by: int, tensor_parallel: int) -> int:
    """`size` rounded up to a multiple of `divisible_by * tensor_parallel`, so that every rank gets an equal, aligned share."""
    multiple = divisible_by * tensor_parallel
    return -(-size // multiple) * multiple


def _file(path: str | Path | None, key: str, tokenizer_type: str) -> Path:
    if path is None:
        raise DataError(f"{tokenizer_type} needs {key}", why="no path is given")
    if not Path(path).is_file():
        kind, command = "a folder" if Path(path).is_dir() else "no such file", prepare_command(path)
        hint = f"{command} creates it" if command else f"correct {key}"
        raise DataError("the tokenizer's file cannot be read", where=str(path), why=kind, hint=hint)
    return Path(path)


def _folder(path: str | Path | None) -> Path:
    if path is None or not Path(path).is_dir():
        raise DataError(
            "HFGPT2Tokenizer needs a folder as vocab_file",
            where=str(path),
            why="no such folder; names on a hub are not downloaded",
            hint="save the tokenizer to a folder first: AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)",
        )
    return Path(path)
