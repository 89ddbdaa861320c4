"""The tokenizer of an exported folder, so that `AutoTokenizer.from_pretrained(folder)` gives the ids of training.

Whatever kind trained the model is written as one `tokenizer.json` of the `tokenizers` library and checked, text by text,
against the tokenizer of training. What that library cannot express exactly is not written; the folder then says so.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from megatron.data.tokenizers import EOD_TEXT, PAD_TEXT, Tokenizer
from megatron.errors import DataError, ExportError, UserError
from megatron.files import write_json
from megatron.generation.load import stored_tokenizer

SAMPLES = (
    "The quick brown fox jumps over the lazy dog, twice.\n\n\tdef f(x):\n        return x ** 2  # spaces\n",
    "na\u00efve caf\u00e9 \u4f60\u597d \u041f\u0440\u0438\u0432\u0435\u0442 \U0001f600 1234567890 !?@#%^&*()",
    "  leading and trailing  ",
)


def export_tokenizer(source: Path, facts: Mapping[str, Any], output: Path, seq_length: int | None) -> list[str]:
    """Write the tokenizer files into `output`; returns notes for the person and the model card.

    Args:
        source: the checkpoint's `tokenizer/` folder, which may be absent. facts: what the manifest says of the tokenizer
            (type, vocab_size, eod, pad). seq_length: becomes `model_max_length`.
    """
    files = sorted(source.iterdir()) if source.is_dir() else []
    if (source / "tokenizer_config.json").is_file():  # it came from a Hugging Face folder: hand it on as it was
        for path in files:
            shutil.copyfile(path, output / path.name)
        return [f"tokenizer: {len(files)} files handed on unchanged"]
    try:
        tokenizer = stored_tokenizer(source, facts.get("type"))
        if tokenizer is None:
            return ["tokenizer: none in the checkpoint; the folder holds the model alone"]
        kind, backend = tokenizer.name, _backend(tokenizer, files)
    except UserError as error:
        return [_copied(files, output, f"it cannot be written as tokenizer.json ({error.what}: {error.why})")]
    wrong = next((text for text in SAMPLES if backend.encode(text).ids != tokenizer.tokenize(text)), None)
    if wrong is not None:
        return [_copied(files, output, f"{kind} has no exact form as tokenizer.json (differs on {wrong[:24]!r})")]
    backend.save(str(output / "tokenizer.json"))
    write_json(output / "tokenizer_config.json", _settings(tokenizer, backend, seq_length))
    return [f"tokenizer: {kind}, {tokenizer.vocab_size} ids, equal to training on {len(SAMPLES)} sample texts"]


def _copied(files: list[Path], output: Path, why: str) -> str:
    for path in files:
        shutil.copyfile(path, output / path.name)
    return f"tokenizer: {why}; its files lie in the folder, AutoTokenizer will not find one"


def _backend(tokenizer: Tokenizer, files: list[Path]) -> Backend:
    """The same tokenizer as an object of the `tokenizers` library."""
    if tokenizer.name == "CharLevelTokenizer":
        return _bytes_backend(tokenizer)
    if tokenizer.name == "SPMTokenizer":
        return _sentencepiece_backend(next(p for p in files if p.suffix == ".model"))
    if tokenizer.name == "GPT2BPETokenizer":
        vocabulary, merges = (next(p for p in files if p.suffix == s) for s in (".json", ".txt"))
        backend = Backend(models.BPE.from_file(str(vocabulary), str(merges)))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        if backend.token_to_id(EOD_TEXT) is not None:
            backend.add_special_tokens([EOD_TEXT])
        return backend
    return Backend.from_file(str(next(p for p in files if p.suffix == ".json")))


def _bytes_backend(tokenizer: Tokenizer) -> Backend:
    """Bytes as ids: a byte-pair vocabulary without a single merge. Ids 0 and 1 are the markers, as in training."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in printable)}
    vocabulary = {letters[byte]: byte for byte in range(256)}
    vocabulary |= {f"<|unused_{i}|>": i for i in range(256, tokenizer.vocab_size)}
    del vocabulary[letters[tokenizer.eod]], vocabulary[letters[tokenizer.pad]]
    vocabulary |= {EOD_TEXT: tokenizer.eod, PAD_TEXT: tokenizer.pad}
    backend = Backend(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([EOD_TEXT, PAD_TEXT])
    return backend


def _sentencepiece_backend(path: Path) -> Backend:
    """A SentencePiece model through the converter of transformers; a near miss is found by the sample texts."""
    from transformers.convert_slow_tokenizer import SpmConverter

    try:
        converter = SpmConverter(SimpleNamespace(vocab_file=str(path)))
        converter.handle_byte_fallback = bool(converter.proto.trainer_spec.byte_fallback)
        return converter.converted()
    except Exception as error:  # the converter raises bare Exception, ImportError without protobuf, ValueError
        raise ExportError("transformers cannot convert this SentencePiece model", why=str(error).splitlines()[0]) from None


def _settings(tokenizer: Tokenizer, backend: Backend, seq_length: int | None) -> dict[str, Any]:
    """tokenizer_config.json: class, special tokens by their text, length."""
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    with contextlib.suppress(DataError):  # a vocabulary without an end of document has no id to name
        for key, number in (("eos_token", tokenizer.eod), ("pad_token", tokenizer.pad)):
            if (text := backend.id_to_token(number)) is not None:
                settings[key] = text
    if seq_length:
        settings["model_max_length"] = seq_length
    settings["padding_side"] = "left"
    return settings
