"""Fetches models of the Hugging Face Hub by name, as a folder that `models.open_model` reads.

Code of a repository is never executed. Models that this project trains (the released layouts of Based, JRT, Mamba and MetaLA,
and our own exports) are imported as a checkpoint and evaluated by our own code; models of transformers' own classes are loaded
by lm-eval's `hf`; a repository that needs its own code is refused.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.errors import DataError
from megatron.files import read_json

# Files that a loader reads; only one weight format is fetched.
_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken")
_WEIGHTS = (("*.safetensors",), ("*.bin",))
# The released Based, JRT and Mamba repositories have no tokenizer; their cards name this one.
_TOKENIZER = "gpt2"
RELEASED_LENGTH = 2048  # maximum length of the released harnesses, in tokens


def is_hub_name(word: str) -> bool:
    """Whether a word can be OWNER/NAME."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", word) is not None and not word.startswith(".")


def fetch(name: str, output: Path) -> Path:
    """Fetch the model `name`; returns the folder in the Hub's cache, or a checkpoint imported under `output`.

    Raises:
        DataError: the model cannot be fetched, or needs its own code.
        ExportError: the model cannot be imported.
    """
    folder = _download(name)
    settings = _settings(folder, name)
    if not _ours(settings):
        if "auto_map" in settings:
            raise DataError(
                f"the model {name} needs code of its repository",
                where=str(folder),
                hint="download it, read that code, and name the folder instead: --model FOLDER runs it",
            )
        return folder
    target = output / "imported" / f"{name.replace('/', '--')}-{folder.name}"
    if not (target / "latest").is_file():
        _import(folder, target)
    return target


def _ours(settings: dict[str, Any]) -> bool:
    from megatron.interop.hf_classes import LINEAR, METALA
    from megatron.interop.released import is_released

    model_types = {family.config_class.model_type for family in (METALA, LINEAR)}
    return is_released(settings) or settings.get("model_type") in model_types


def _download(name: str) -> Path:
    """Download the files that a loader reads into the Hub's cache; works offline if they are cached."""
    folder = _snapshot(name, (*_FILES, *_WEIGHTS[0]))
    return folder if any(folder.glob(_WEIGHTS[0][0])) else _snapshot(name, (*_FILES, *_WEIGHTS[1]))


def _snapshot(name: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(
            f"there is no folder {name}, and the Hub has no accessible model of that name",
            why=next(iter(str(error).strip().splitlines()), type(error).__name__),
            hint="--model FOLDER; for private models `hf auth login`; HF_ENDPOINT names another Hub",
        ) from None


def _settings(folder: Path, name: str) -> dict[str, Any]:
    try:
        settings = read_json(folder / "config.json")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"the model {name} has no readable config.json", where=str(folder), why=str(error)) from None
    if not isinstance(settings, dict):
        raise DataError(f"the model {name} has a config.json that is not an object", where=str(folder))
    return settings


def _import(folder: Path, target: Path) -> None:
    """Import into a temporary sibling folder and rename it to `target`."""
    from megatron.interop.import_hf import import_folder
    from megatron.interop.released import is_released

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".importing-") as scratch:
        imported = Path(scratch, "imported")
        lacks_tokenizer = is_released(_settings(folder, folder.name)) and not any(folder.glob("*token*"))
        tokenizer = _snapshot(_TOKENIZER, ("tokenizer*.json", "vocab.json", "merges.txt")) if lacks_tokenizer else None
        import_folder(folder, imported, tokenizer=tokenizer)
        shutil.rmtree(target, ignore_errors=True)
        imported.rename(target)
