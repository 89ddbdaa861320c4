"""Tokenizers in OpenAI's rank files (`*.tiktoken`): one line per token, its bytes in base64 and its rank.

The released MetaLA models use one with 100,256 ranks in a vocabulary of 100,280. A rank file says neither how text is cut
before the merges nor which special tokens follow the ranks. Both come from `NAME.tiktoken.json` beside it
(`{"pattern": ..., "special_tokens": {text: id}, "vocab_size": ...}`, each optional), else from the number of ranks.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.data.tokenizer_base import EOD_TEXT, MOST_IDS, PAD_TEXT, Tokenizer, unreadable
from megatron.errors import DataError
from megatron.files import read_json

# How GPT-2's and GPT-4's vocabularies cut text; facts of those vocabularies, without which the ranks give other tokens.
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_CL100K_PATTERN = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
_CL100K_SPECIAL = {
    EOD_TEXT: 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
}


@dataclass(frozen=True)
class _Settings:
    """What a rank file does not say."""

    pattern: str
    special_tokens: dict[str, int]
    vocab_size: int


class TiktokenTokenizer(Tokenizer):
    """A rank file.

    Special tokens of the settings are recognised in text, as the JSON tokenizers do; ids between them and up to `vocab_size`
    are reserved and never come out of a text.

    Attributes:
        ranks: token bytes -> id.
        pattern: how a text is cut before bytes are merged.
        special_tokens: text -> id.

    Raises:
        DataError: the file is not one, its ranks have gaps or repeat, or the settings contradict it.
    """

    name = "TiktokenTokenizer"

    def __init__(self, vocab_file: Path) -> None:
        side = vocab_file.with_name(vocab_file.name + ".json")
        super().__init__([vocab_file, side] if side.is_file() else [vocab_file])
        ranks = _read_ranks(vocab_file)
        settings = _settings(side, len(ranks))
        self.ranks, self.pattern, self.special_tokens = ranks, settings.pattern, settings.special_tokens
        self._vocab_size = settings.vocab_size
        from tiktoken import Encoding

        try:
            self._backend = Encoding(
                vocab_file.stem,
                pat_str=settings.pattern,
                mergeable_ranks=ranks,
                special_tokens=dict(settings.special_tokens),
            )
        except (ValueError, AssertionError) as error:
            raise unreadable(side if side.is_file() else vocab_file, "a rank file with its settings", error) from None

    @property
    def vocab_size(self) -> int:
        """Ids, special and reserved ones included."""
        return self._vocab_size

    @property
    def eod(self) -> int:
        """Id of `<|endoftext|>`."""
        if EOD_TEXT not in self.special_tokens:
            why = "it ends every document"
            raise DataError(f"the tokenizer has no token {EOD_TEXT}", where=str(self._files[0]), why=why)
        return self.special_tokens[EOD_TEXT]

    @property
    def pad(self) -> int:
        """Id of `<|padding|>`, or the eod."""
        return self.special_tokens.get(PAD_TEXT, self.eod)

    def tokenize(self, text: str) -> list[int]:
        """Ids of `text`."""
        return list(self._backend.encode(text, allowed_special="all"))

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, in order, in this thread: the workers are processes."""
        return [list(self._backend.encode(text, allowed_special="all")) for text in texts]

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of `ids`; reserved ids become U+FFFD."""
        known = set(self.special_tokens.values())
        pieces = (
            self._backend.decode_single_token_bytes(i) if i < len(self.ranks) or i in known else "\ufffd".encode() for i in ids
        )
        return b"".join(pieces).decode("utf-8", errors="replace")


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes -> rank, proved to be 0, 1, 2, ... with every single byte among them."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(
                "the line is not a token and its rank",
                where=f"{path}:{number}",
                why=str(error),
                hint="a .tiktoken file has lines such as: IQ== 0",
            ) from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if sorted(ranks.values()) != list(range(len(ranks))) or missing or not ranks:
        why = f"the bytes {missing[:5]} are no tokens" if missing else "ranks are missing or given twice"
        raise DataError("the rank file is incomplete", where=str(path), why=why, hint="download or copy it again")
    return ranks


def _settings(side: Path, ranks: int) -> _Settings:
    """From the file beside the ranks, else what is known for that number of ranks, else one `<|endoftext|>` behind them."""
    special, size = {EOD_TEXT: ranks}, ranks + 1
    if ranks == 100256:
        special, size = _CL100K_SPECIAL, 100280
    pattern = _GPT2_PATTERN if ranks == 50256 else _CL100K_PATTERN
    given = _read_settings(side) if side.is_file() else {}
    special = given.get("special_tokens", special)
    size = given.get("vocab_size", max([size, *(value + 1 for value in special.values())]))
    if size > MOST_IDS:
        why = f"at most {MOST_IDS:,} ids are used: each is a row of the embedding"
        raise DataError(f"a token has the id {size - 1}", where=str(side), why=why)
    wrong = [text for text, value in special.items() if not ranks <= value < size]
    if wrong or len(set(special.values())) != len(special):
        raise DataError(
            "the special tokens do not fit the rank file",
            where=str(side),
            why=f"{wrong or 'two of them'}: ids must differ and lie in {ranks}..{size - 1}",
        )
    if "" in special:
        raise DataError("a special token is empty", where=str(side), why="it would be found at every place of every text")
    pattern = given.get("pattern", pattern)
    if _matches_nothing(pattern):
        why = "it matches the empty text, and tiktoken ends the process at such a match"
        raise DataError("the pattern of a rank file cannot cut text", where=str(side), why=why)
    return _Settings(pattern, dict(special), size)


def _matches_nothing(pattern: str) -> bool:
    """Whether a pattern of the `regex` library matches the empty text; one that it cannot read is left to tiktoken."""
    import regex

    try:
        return regex.search(pattern, "") is not None
    except regex.error:
        return False


def _read_settings(side: Path) -> dict[str, Any]:
    kinds: dict[str, type] = {"pattern": str, "special_tokens": dict, "vocab_size": int}
    try:
        given = read_json(side)
        whole = isinstance(given, dict) and all(isinstance(given[key], kinds[key]) for key in given)
        whole = whole and all(isinstance(value, int) for value in given.get("special_tokens", {}).values())
    except (OSError, ValueError, KeyError) as error:
        raise unreadable(side, "settings of a rank file", error) from None
    if not whole:
        raise unreadable(side, "settings of a rank file", ValueError(f"known keys and types: {kinds}"))
    return dict(given)
