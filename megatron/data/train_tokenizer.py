"""Trains a tokenizer on a corpus: byte-level BPE (as in NeoX) or SentencePiece. The same text gives the same file."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

from megatron.data.tokenizer_base import EOD_TEXT, PAD_TEXT
from megatron.errors import DataError
from megatron.files import atomic_open

_LONGEST_PIECE_TEXT = 4000  # bytes: SentencePiece leaves out sentences of more than 4192


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """The JSON of a byte-level BPE trained on `texts`; ids 0 and 1 are `<|endoftext|>` and `<|padding|>`. Text is not normalized.

    Raises:
        DataError: `vocab_size` is below 258 (256 bytes and 2 special tokens).
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 258:
        raise DataError(f"a vocabulary of {vocab_size} is too small", why="256 bytes and 2 special tokens need 258")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD_TEXT, PAD_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return str(backend.to_str(pretty=True))


def train_sentencepiece(texts: Iterable[str], vocab_size: int, model_type: str = "bpe") -> bytes:
    """A SentencePiece model trained on the lines of `texts`, with `<|endoftext|>` and `<|padding|>` as control pieces.

    Unknown characters fall back to bytes, digits are split, white space is kept: decoding is lossless.

    Args:
        model_type: `bpe` or `unigram`.

    Raises:
        DataError: SentencePiece cannot train such a vocabulary on this text.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            control_symbols=[EOD_TEXT, PAD_TEXT],
            hard_vocab_limit=False,
            num_threads=1,  # with more threads the model would depend on their timing
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1:] or ["it does not say why"]
        raise DataError(f"no vocabulary of {vocab_size} could be trained", why=reason[0]) from None
    return model.getvalue()


def _lines(texts: Iterable[str]) -> Iterable[str]:
    for text in texts:
        for line in text.split("\n"):
            for at in range(0, len(line), _LONGEST_PIECE_TEXT // 4):
                yield line[at : at + _LONGEST_PIECE_TEXT // 4]


def train_to_file(texts: Iterable[str], kind: str, vocab_size: int, output: Path) -> None:
    """Train and write atomically.

    Args:
        texts: the training text.
        kind: `bpe` (a JSON for HFTokenizer), `spm-bpe` or `spm-unigram` (a model for SPMTokenizer).
        vocab_size: entries of the vocabulary.
        output: the file to write.
    """
    if kind == "bpe":
        content = train_byte_level_bpe(texts, vocab_size).encode()
    elif kind in ("spm-bpe", "spm-unigram"):
        content = train_sentencepiece(texts, vocab_size, kind[4:])
    else:
        raise DataError(f"tokenizer kind {kind!r} is unknown", hint="bpe, spm-bpe or spm-unigram")
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(output) as handle:
        handle.write(content)
