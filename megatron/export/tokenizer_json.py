"""Converts any of our tokenizers to an object of the `tokenizers` library, the content of a `tokenizer.json`.

The object yields the ids of a prompt (`Tokenizer.tokenize_prompt`): users of an exported folder pass its output to `generate`,
and a token after the text would end it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from megatron.data.hf_tokenizers import HFGPT2Tokenizer, HFTokenizer
from megatron.data.tiktoken_file import TiktokenTokenizer
from megatron.data.tokenizers import EOD_TEXT, PAD_TEXT, SPMTokenizer, Template, Tokenizer
from megatron.errors import ExportError


def prompt_backend(tokenizer: Tokenizer, rows: int | None = None) -> Backend:
    """The backend for a tokenizer of any kind; the caller must check that it yields the same ids.

    Args:
        tokenizer: tokenizer of any kind.
        rows: rows of the model's embedding, if known; a padding token added by loading a folder is dropped if it has no row.

    Raises:
        ExportError: the tokenizer has no such form.
    """
    if isinstance(tokenizer, HFTokenizer):
        return _without_end(tokenizer, rows)
    if isinstance(tokenizer, TiktokenTokenizer):
        return _rank_backend(tokenizer)
    if isinstance(tokenizer, SPMTokenizer):
        return _sentencepiece_backend(tokenizer)
    if tokenizer.name == "CharLevelTokenizer":
        return _byte_backend(tokenizer)
    raise ExportError(f"a {tokenizer.name} has no tokenizer.json", why="no rule is known for it")


def _without_end(tokenizer: HFTokenizer, rows: int | None) -> Backend:
    """The tokenizer without the tokens that its template adds after a text."""
    content = json.loads(tokenizer.to_json())
    added_pad = tokenizer.added_pad if isinstance(tokenizer, HFGPT2Tokenizer) else None
    if rows is not None and added_pad is not None and added_pad >= rows:
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] != added_pad]
    if tokenizer.template.after:
        content["post_processor"] = _start_only(content["post_processor"], tokenizer)
    return Backend.from_str(json.dumps(content))


def _start_only(processor: Mapping[str, Any], tokenizer: HFTokenizer) -> dict[str, Any] | None:
    """A post-processor that adds `template.before` only; ByteLevel processors, which set offsets, stay."""
    processors = processor["processors"] if processor["type"] == "Sequence" else [processor]
    remaining = [processor_ for processor_ in processors if processor_["type"] == "ByteLevel"]
    if tokenizer.template.before:
        remaining.append(_start_template(tokenizer.template, tokenizer))
    return {"type": "Sequence", "processors": remaining} if remaining else None


def _start_template(template: Template, tokenizer: HFTokenizer) -> dict[str, Any]:
    names = {number: tokenizer.token_text(number) for number in template.before}
    start = [{"SpecialToken": {"id": names[number], "type_id": 0}} for number in template.before]
    first, second = ({"Sequence": {"id": name, "type_id": kind}} for name, kind in (("A", 0), ("B", 1)))
    special = {name: {"id": name, "ids": [number], "tokens": [name]} for number, name in names.items()}
    return {
        "type": "TemplateProcessing",
        "single": [*start, first],
        "pair": [*start, first, second],
        "special_tokens": special,
    }


def _letters() -> dict[int, str]:
    """Byte -> its printable character in a byte-level vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _byte_backend(tokenizer: Tokenizer) -> Backend:
    """Bytes as ids: a byte-pair vocabulary without merges. Ids 0 and 1 are the eod and padding tokens, as in training."""
    letters = _letters()
    vocabulary = {letters[byte]: byte for byte in range(256)}
    vocabulary |= {f"<|unused_{i}|>": i for i in range(256, tokenizer.vocab_size)}
    del vocabulary[letters[tokenizer.eod]], vocabulary[letters[tokenizer.pad]]
    vocabulary |= {EOD_TEXT: tokenizer.eod, PAD_TEXT: tokenizer.pad}
    backend = Backend(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([EOD_TEXT, PAD_TEXT])
    return backend


def _rank_backend(tokenizer: TiktokenTokenizer) -> Backend:
    """A rank file: ranks become ids, and every split of a token into two tokens becomes a merge, ordered by rank.

    Special tokens keep their ids, which may leave gaps; reserved ids have no token, as in training.
    """
    ranks, letters = tokenizer.ranks, _letters()
    text = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs = [pair for pair in halves if pair[0] in ranks and pair[1] in ranks]
        merges += [(text[a], text[b]) for a, b in sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))]
    vocabulary = {text[token]: rank for token, rank in ranks.items()} | tokenizer.special_tokens
    backend = Backend(models.BPE(vocabulary, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(tokenizer.pattern), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(tokenizer.special_tokens))
    return backend


def _sentencepiece_backend(tokenizer: SPMTokenizer) -> Backend:
    """A SentencePiece model through transformers' converter; the sample texts detect inexact conversions."""
    from transformers.convert_slow_tokenizer import SpmConverter

    try:
        converter = SpmConverter(SimpleNamespace(vocab_file=str(tokenizer.files()[0])))
        converter.handle_byte_fallback = bool(converter.proto.trainer_spec.byte_fallback)
        return converter.converted()
    except Exception as error:  # the converter raises bare Exception, ImportError without protobuf, ValueError
        raise ExportError("transformers cannot convert this SentencePiece model", why=str(error).splitlines()[0]) from None
