"""The tokenizers a configuration can name; the names are NeoX's `tokenizer_type` values.

Libraries are imported by the class that needs them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.data.tiktoken_file import TiktokenTokenizer
from megatron.data.tokenizer_base import EOD_TEXT, PAD_TEXT, Tokenizer, unreadable
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
    "TiktokenTokenizer",
    "Tokenizer",
    "build_tokenizer",
    "padded_vocab_size",
]


class HFTokenizer(Tokenizer):
    """A JSON file of the `tokenizers` library (NeoX's `HFTokenizer`: Pythia, GPT-NeoX-20B)."""

    name = "HFTokenizer"

    def __init__(self, vocab_file: Path) -> None:
        super().__init__([vocab_file])
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_file(str(vocab_file))
        except Exception as error:  # the library raises bare Exception
            raise unreadable(vocab_file, "a tokenizers JSON", error) from None
        self._eod_text, self._pad_text = EOD_TEXT, PAD_TEXT

    @property
    def vocab_size(self) -> int:
        """Ids, added special tokens included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def eod(self) -> int:
        """Id that ends a document."""
        token = self._backend.token_to_id(self._eod_text)
        if token is None:
            raise DataError(
                f"the tokenizer has no token {self._eod_text}",
                where=str(self._files[0]),
                why="it ends every document",
                hint=f"add {self._eod_text} as a special token, or use another tokenizer",
            )
        return int(token)

    @property
    def pad(self) -> int:
        """Id to fill short rows with."""
        token = self._backend.token_to_id(self._pad_text)
        return self.eod if token is None else int(token)

    def tokenize(self, text: str) -> list[int]:
        """Ids of `text`."""
        return list(self._backend.encode(text).ids)

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, in order, on the threads of the library."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts))]

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of `ids`."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))


class GPT2BPETokenizer(HFTokenizer):
    """GPT-2's pair of files: vocabulary (JSON) and merges (text)."""

    name = "GPT2BPETokenizer"

    def __init__(self, vocab_file: Path, merge_file: Path) -> None:
        Tokenizer.__init__(self, [vocab_file, merge_file])
        self._backend = _gpt2_backend(vocab_file, merge_file)
        self._eod_text, self._pad_text = EOD_TEXT, PAD_TEXT


class HFGPT2Tokenizer(HFTokenizer):
    """A Hugging Face tokenizer folder: `tokenizer.json`, or `vocab.json` with `merges.txt`; a padding token is added if
    missing.

    The end-of-document token is the folder's `eos_token` (from `tokenizer_config.json` or `special_tokens_map.json`).
    """

    name = "HFGPT2Tokenizer"

    def __init__(self, folder: Path) -> None:
        whole, pair = folder / "tokenizer.json", [folder / "vocab.json", folder / "merges.txt"]
        settings = [path for path in (folder / "tokenizer_config.json", folder / "special_tokens_map.json") if path.is_file()]
        if whole.is_file():
            super().__init__(whole)
            self._files = [whole, *settings]
        elif all(path.is_file() for path in pair):
            Tokenizer.__init__(self, [*pair, *settings])
            self._backend = _gpt2_backend(*pair)
        else:
            raise DataError(
                "the folder holds no tokenizer",
                where=str(folder),
                why="it has neither tokenizer.json nor vocab.json with merges.txt",
                hint="save one there: AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)",
            )
        self._eod_text = _special(settings, "eos_token") or EOD_TEXT
        self._pad_text = _special(settings, "pad_token") or PAD_TEXT
        if self._backend.token_to_id(self._pad_text) is None:
            self._backend.add_special_tokens([self._pad_text])


class SPMTokenizer(Tokenizer):
    """A SentencePiece model. The end of a document is the piece `<|endoftext|>`, else the unknown id, as in NeoX."""

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
        own, piece = int(self._backend.pad_id()), int(self._backend.piece_to_id(PAD_TEXT))
        if own >= 0:
            return own
        return self.eod if piece == self._backend.unk_id() else piece

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
    """The tokenizer a configuration names (`tokenizer_type` in any case, as in NeoX).

    Raises:
        DataError: unknown type, or a file that is missing, unreadable or of another kind.
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
        kind = "a folder" if Path(path).is_dir() else "no such file"
        raise DataError("the tokenizer's file cannot be read", where=str(path), why=kind, hint=f"correct {key}")
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


def _gpt2_backend(vocab_file: Path, merge_file: Path) -> Any:
    """Byte-level BPE from GPT-2's files; only `<|endoftext|>` is special, all else in the text is plain text."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend(models.BPE.from_file(str(vocab_file), str(merge_file)))
    except Exception as error:  # the library raises bare Exception
        raise unreadable(vocab_file, f"a GPT-2 vocabulary that fits {merge_file}", error) from None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id(EOD_TEXT) is not None:
        backend.add_special_tokens([AddedToken(EOD_TEXT, normalized=False)])
    return backend


def _special(settings: Sequence[Path], key: str) -> str | None:
    """A special token's text in HF's settings, where it is a string or an object with `content`."""
    for path in settings:
        try:
            value = json.loads(path.read_text("utf-8")).get(key)
        except (ValueError, AttributeError) as error:
            raise unreadable(path, "HF tokenizer settings", error) from None
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            return value
    return None
