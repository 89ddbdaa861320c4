"""Models of the Hugging Face Hub by name, made into something on disk that `models.open_model` reads.

Nothing of a repository is run. Models of the kinds that this project trains, in the layouts in which Based, JRT, Mamba and
MetaLA were released or in that of our own exports, are imported as a checkpoint and measured by our own code; models of
transformers' own kinds are read by lm-eval's `hf`; a repository that needs code of its own is refused.
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

# What a loader reads; weights in several formats are not all fetched.
_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken")
_WEIGHTS = (("*.safetensors",), ("*.bin",))
# The released Based, JRT and Mamba repositories hold no tokenizer; their cards name this one.
_TOKENIZER = "gpt2"
RELEASED_LENGTH = 2048  # tokens that the released harnesses read at most


def is_hub_name(word: str) -> bool:
    """Whether a word can be OWNER/NAME."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", word) is not None and not word.startswith(".")


def fetch(name: str, output: Path) -> Path:
    """The model `name` of the Hub as a folder: the Hub's own copy on this machine, or a checkpoint under `output`.

    Raises:
        DataError: it cannot be fetched, or it runs code of its own. ExportError: it cannot be imported.
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
    place = output / "imported" / f"{name.replace('/', '--')}-{folder.name}"
    if not (place / "latest").is_file():
        _import(folder, place)
    return place


def _ours(settings: dict[str, Any]) -> bool:
    from megatron.interop.hf_classes import LINEAR, METALA
    from megatron.interop.released import is_released

    known = {family.config_class.model_type for family in (METALA, LINEAR)}
    return is_released(settings) or settings.get("model_type") in known


def _download(name: str) -> Path:
    """All files of a model that are read, in the Hub's cache; nothing is sent when they are there and the Hub is offline."""
    folder = _snapshot(name, (*_FILES, *_WEIGHTS[0]))
    return folder if any(folder.glob(_WEIGHTS[0][0])) else _snapshot(name, (*_FILES, *_WEIGHTS[1]))


def _snapshot(name: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(
            f"there is no folder {name}, and the Hub does not give a model of that name",
            why=next(iter(str(error).strip().splitlines()), type(error).__name__),
            hint="--model FOLDER; for private models `hf auth login`; HF_ENDPOINT names another Hub",
        ) from None


def _settings(folder: Path, name: str) -> dict[str, Any]:
    try:
        found = read_json(folder / "config.json")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"the model {name} has no config.json that can be read", where=str(folder), why=str(error)) from None
    if not isinstance(found, dict):
        raise DataError(f"the model {name} has a config.json that is no object", where=str(folder))
    return found


def _import(folder: Path, place: Path) -> None:
    """Import into a folder beside `place` and move it there whole."""
    from megatron.interop.import_hf import import_folder
    from megatron.interop.released import is_released

    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".importing-") as scratch:
        made = Path(scratch, "made")
        bare = is_released(_settings(folder, folder.name)) and not any(folder.glob("*token*"))
        tokenizer = _snapshot(_TOKENIZER, ("tokenizer*.json", "vocab.json", "merges.txt")) if bare else None
        import_folder(folder, made, tokenizer=tokenizer)
        shutil.rmtree(place, ignore_errors=True)
        made.rename(place)
