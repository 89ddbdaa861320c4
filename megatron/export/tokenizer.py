"""The tokenizer of an exported folder, so that `AutoTokenizer.from_pretrained(folder)` yields the ids of training.

A tokenizer of any kind is written as one `tokenizer.json` with settings that do not change its ids, loaded as a user would, and
compared on sample texts with the tokenizer of training. If there is no exact form, its original files are copied and a note in
the model card says so.

Two settings of a `tokenizer.json` are not exported: stored truncation and padding (training did not use them either), and
the tokens that its template adds after a text. A folder's users continue prompts, and an end-of-text token after a prompt ends
it. A note in the model card names these tokens.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from megatron.data.hf_tokenizers import HFGPT2Tokenizer
from megatron.data.tokenizers import Tokenizer
from megatron.errors import DataError, ExportError, UserError
from megatron.export.tokenizer_json import prompt_backend
from megatron.files import read_json, write_json
from megatron.generation.load import stored_tokenizer

SAMPLES = (
    "The quick brown fox jumps over the lazy dog, twice.\n\n\tdef f(x):\n        return x ** 2  # spaces\n",
    "na\u00efve caf\u00e9 \u4f60\u597d \u041f\u0440\u0438\u0432\u0435\u0442 \U0001f600 1234567890 !?@#%^&*()",
    "  leading and trailing  ",
)
_WRITTEN = ("tokenizer.json", "tokenizer_config.json")
_SETTINGS = (*_WRITTEN, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
# Settings of a Hugging Face folder that make AutoTokenizer deviate from tokenizer.json.
_OVERRIDES = {"tokenizer_class", "auto_map", "add_bos_token", "add_eos_token", "added_tokens_decoder", "split_special_tokens"}
_OVERRIDES |= {
    "add_prefix_space",
    "legacy",
    "from_slow",
    "tokenizer_file",
    "vocab_file",
    "merges_file",
    "special_tokens_map_file",
}
_OVERRIDES |= {"name_or_path", "backend", "is_local", "processor_class", "max_length", "stride", "truncation_strategy"}
_OVERRIDES |= {"truncation_side", "pad_to_multiple_of", "pad_token_type_id"}


def export_tokenizer(source: Path, facts: Mapping[str, Any], output: Path, seq_length: int | None) -> list[str]:
    """Write the tokenizer files into `output`.

    Args:
        source: the checkpoint's `tokenizer/` folder, which may be missing.
        facts: the manifest's tokenizer metadata (type, vocab_size, eod, pad).
        output: the exported folder, with its config.json, which AutoTokenizer reads too.
        seq_length: becomes `model_max_length`.

    Returns:
        Notes for the user and the model card.
    """
    files = sorted(source.iterdir()) if source.is_dir() else []
    try:
        tokenizer = stored_tokenizer(source, facts.get("type"))
        if tokenizer is None:
            return ["tokenizer: none in the checkpoint; the folder holds the model alone"]
        largest = _write(tokenizer, output, seq_length, facts.get("vocab_size"))
    except UserError as error:
        for name in _WRITTEN:
            (output / name).unlink(missing_ok=True)
        return _copied(files, output, ": ".join(text for text in (error.what, error.why) if text))
    for path in files:  # a chat template, or a SentencePiece model for other programs
        if isinstance(tokenizer, HFGPT2Tokenizer) and path.name not in _SETTINGS:
            shutil.copyfile(path, output / path.name)
    ids = min(tokenizer.vocab_size, facts.get("vocab_size") or tokenizer.vocab_size)
    notes = [f"tokenizer: {tokenizer.name}, {ids} ids, equal to training on {len(SAMPLES)} sample texts"]
    if largest is not None:
        notes.append(f"tokenizer: its ids {facts['vocab_size']} to {largest} have no row in the model")
    if tokenizer.template.after:
        ends = " ".join(tokenizer.detokenize([number]) for number in tokenizer.template.after)
        notes.append(
            f"tokenizer: in training every document ended with {ends}; the tokenizer of this folder does not add it, so that a"
            " prompt stays open: append it to complete documents yourself"
        )
    return notes


def _write(tokenizer: Tokenizer, output: Path, seq_length: int | None, rows: int | None) -> int | None:
    """Write and check `tokenizer.json` and `tokenizer_config.json`; returns the largest id if the model has no row for it.

    Raises:
        ExportError: their ids would differ from training.
    """
    backend = prompt_backend(tokenizer, rows)
    wrong = next((text for text in SAMPLES if backend.encode(text).ids != tokenizer.tokenize_prompt(text)), None)
    if wrong is not None:
        raise ExportError(f"{tokenizer.name} has no exact form", why=f"ids differ on {wrong[:24]!r}")
    backend.save(str(output / "tokenizer.json"))
    write_json(output / "tokenizer_config.json", _settings(tokenizer, backend, seq_length))
    _check_files(backend, output)
    largest = max(backend.get_vocab(with_added_tokens=True).values())
    return None if rows is None or largest < rows else largest


def _check_files(backend: Backend, output: Path) -> None:
    """Load the files as a user does; texts with special tokens reveal settings that change the tokenizer."""
    from transformers import AutoTokenizer

    special = [token.content for token in backend.get_added_tokens_decoder().values()]
    texts = [*SAMPLES, *(f"a {token} b{token}c" for token in special[:64])]
    try:
        with _without_warnings():  # about a class without its code, and texts longer than those of training
            loaded_ids = AutoTokenizer.from_pretrained(output, trust_remote_code=False)(texts)["input_ids"]
    except Exception as error:  # settings from a user's folder can raise anything in transformers
        raise ExportError("AutoTokenizer cannot read the written files", why=repr(error)) from None
    for text, ids in zip(texts, loaded_ids, strict=True):
        if ids != backend.encode(text).ids:
            raise ExportError("AutoTokenizer interprets tokenizer.json differently", why=f"ids differ on {text[:24]!r}")


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence transformers' warnings."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _copied(files: Sequence[Path], output: Path, reason: str) -> list[str]:
    """Copy the files, and disable the setting of a Hugging Face folder that appends an end token to prompts."""
    for path in files:
        shutil.copyfile(path, output / path.name)
    notes = [f"tokenizer: it cannot be written as tokenizer.json ({reason}); its original files are in the folder"]
    settings = output / "tokenizer_config.json"
    with contextlib.suppress(OSError, ValueError, AttributeError):
        stored = read_json(settings)
        if stored.get("add_eos_token"):
            write_json(settings, {**stored, "add_eos_token": False})
            notes.append("tokenizer: add_eos_token was disabled, so that a prompt stays open")
    return notes


def _settings(tokenizer: Tokenizer, backend: Backend, seq_length: int | None) -> dict[str, Any]:
    """tokenizer_config.json: class, special tokens as text, length; for a Hugging Face folder also its other settings."""
    folder_settings = tokenizer.settings if isinstance(tokenizer, HFGPT2Tokenizer) else {}
    settings = {key: _known(value, key, backend) for key, value in folder_settings.items() if key not in _OVERRIDES}
    settings = {key: value for key, value in settings.items() if value is not None}
    if seq_length:
        settings.setdefault("model_max_length", seq_length)
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "padding_side": "left"}
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    for key, name in (("bos_token", "bos"), ("eos_token", "eod"), ("pad_token", "pad")):
        with contextlib.suppress(DataError):  # a vocabulary without an end-of-document token
            number = getattr(tokenizer, name)
            if (
                name == "pad" and backend.id_to_token(number) is None
            ):  # the padding token added by loading the folder has no row
                number = tokenizer.eod
            if number is not None and (text := backend.id_to_token(number)) is not None:
                settings[key] = text
    return settings


def _known(value: Any, key: str, backend: Backend) -> Any:
    """A setting; None for a special token that tokenizer.json lacks, which would get a new id."""
    if key.endswith("special_tokens"):
        if isinstance(value, dict):
            return {name: token for name, token in value.items() if _known(token, "_token", backend)}
        return [token for token in value if _known(token, "_token", backend)] if isinstance(value, list) else None
    if not key.endswith("_token"):
        return value
    text = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(text, str) and backend.token_to_id(text) is not None else None
