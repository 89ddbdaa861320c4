"""The tokenizer of an exported folder, so that `AutoTokenizer.from_pretrained(folder)` gives the ids of training.

Whatever kind trained the model is written as one `tokenizer.json` with settings that leave its ids alone, loaded again as a
user would, and compared text by text with the tokenizer of training. What cannot be written exactly is not written; the folder
then says so.

Two things of a `tokenizer.json` are about calls and not about text, and do not come along: stored truncation and padding (they
took no part in training either), and what its template adds behind a text. A model in a folder is there to continue prompts; an
end-of-text behind one ends it. The note that goes into the model card names the tokens.
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
# Settings of a Hugging Face folder that make AutoTokenizer build something else than what tokenizer.json says.
_CALLERS = {"tokenizer_class", "auto_map", "add_bos_token", "add_eos_token", "added_tokens_decoder", "split_special_tokens"}
_CALLERS |= {
    "add_prefix_space",
    "legacy",
    "from_slow",
    "tokenizer_file",
    "vocab_file",
    "merges_file",
    "special_tokens_map_file",
}
_CALLERS |= {"name_or_path", "backend", "is_local", "processor_class", "max_length", "stride", "truncation_strategy"}
_CALLERS |= {"truncation_side", "pad_to_multiple_of", "pad_token_type_id"}


def export_tokenizer(source: Path, facts: Mapping[str, Any], output: Path, seq_length: int | None) -> list[str]:
    """Write the tokenizer files into `output`; returns notes for the person and the model card.

    Args:
        source: the checkpoint's `tokenizer/` folder, which may be absent. facts: what the manifest says of the tokenizer
            (type, vocab_size, eod, pad). output: with its config.json, which AutoTokenizer reads too. seq_length: becomes
            `model_max_length`.
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
        return _copied(files, output, ": ".join(part for part in (error.what, error.why) if part))
    for path in files:  # a chat template, or a SentencePiece model that other programs look for
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
            " prompt stays open: append it yourself to whole documents"
        )
    return notes


def _write(tokenizer: Tokenizer, output: Path, seq_length: int | None, rows: int | None) -> int | None:
    """Write `tokenizer.json` and `tokenizer_config.json`, and prove them; returns the largest id if it has no row in the model.

    Raises:
        ExportError: they would give other ids than training.
    """
    backend = prompt_backend(tokenizer, rows)
    wrong = next((text for text in SAMPLES if backend.encode(text).ids != tokenizer.tokenize_prompt(text)), None)
    if wrong is not None:
        raise ExportError(f"{tokenizer.name} has no exact form", why=f"ids differ on {wrong[:24]!r}")
    backend.save(str(output / "tokenizer.json"))
    write_json(output / "tokenizer_config.json", _settings(tokenizer, backend, seq_length))
    _prove(backend, output)
    largest = max(backend.get_vocab(with_added_tokens=True).values())
    return None if rows is None or largest < rows else largest


def _prove(backend: Backend, output: Path) -> None:
    """Load what was written as a user does; texts with special tokens in them show settings that change the tokenizer."""
    from transformers import AutoTokenizer

    special = [token.content for token in backend.get_added_tokens_decoder().values()]
    texts = [*SAMPLES, *(f"a {token} b{token}c" for token in special[:64])]
    try:
        with _without_warnings():  # of a class without its code, and of texts longer than those of training
            found = AutoTokenizer.from_pretrained(output, trust_remote_code=False)(texts)["input_ids"]
    except Exception as error:  # the settings are those of a person's folder; transformers raises what they lead to
        raise ExportError("AutoTokenizer cannot read what was written", why=repr(error)) from None
    for text, got in zip(texts, found, strict=True):
        if got != backend.encode(text).ids:
            raise ExportError(
                "AutoTokenizer reads tokenizer.json otherwise than it was meant", why=f"ids differ on {text[:24]!r}"
            )


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """transformers says nothing but errors meanwhile."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _copied(files: Sequence[Path], output: Path, why: str) -> list[str]:
    """Hand the files on as they are, except that settings of a Hugging Face folder no longer ask for an end behind prompts."""
    for path in files:
        shutil.copyfile(path, output / path.name)
    notes = [f"tokenizer: it cannot be written as tokenizer.json ({why}); its files lie in the folder as they were"]
    settings = output / "tokenizer_config.json"
    with contextlib.suppress(OSError, ValueError, AttributeError):
        given = read_json(settings)
        if given.get("add_eos_token"):
            write_json(settings, {**given, "add_eos_token": False})
            notes.append("tokenizer: add_eos_token was switched off, so that a prompt is not ended")
    return notes


def _settings(tokenizer: Tokenizer, backend: Backend, seq_length: int | None) -> dict[str, Any]:
    """tokenizer_config.json: class, special tokens by their text, length; of a Hugging Face folder also the rest of its own."""
    given = tokenizer.settings if isinstance(tokenizer, HFGPT2Tokenizer) else {}
    settings = {key: _known(value, key, backend) for key, value in given.items() if key not in _CALLERS}
    settings = {key: value for key, value in settings.items() if value is not None}
    if seq_length:
        settings.setdefault("model_max_length", seq_length)
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "padding_side": "left"}
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    for key, name in (("bos_token", "bos"), ("eos_token", "eod"), ("pad_token", "pad")):
        with contextlib.suppress(DataError):  # a vocabulary without an end of document has no id to name
            number = getattr(tokenizer, name)
            if name == "pad" and backend.id_to_token(number) is None:  # the one that reading the folder added has no row
                number = tokenizer.eod
            if number is not None and (text := backend.id_to_token(number)) is not None:
                settings[key] = text
    return settings


def _known(value: Any, key: str, backend: Backend) -> Any:
    """A setting, None for a special token that tokenizer.json does not have: it would be given a new id."""
    if key.endswith("special_tokens"):
        if isinstance(value, dict):
            return {name: token for name, token in value.items() if _known(token, "_token", backend)}
        return [token for token in value if _known(token, "_token", backend)] if isinstance(value, list) else None
    if not key.endswith("_token"):
        return value
    text = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(text, str) and backend.token_to_id(text) is not None else None
