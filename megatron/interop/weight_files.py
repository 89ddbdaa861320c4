"""Reads weight files of Hugging Face folders: safetensors (single or sharded) and `pytorch_model.bin`, without running code.

A `.bin` file is a pickle; `interop/neox_files.py` reads it with torch's restricted unpickler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron import files
from megatron.errors import CheckpointError, ExportError
from megatron.interop.neox_files import read_pickle

_SINGLE = ("model.safetensors", "pytorch_model.bin")
_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def load_foreign_pickle(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a `torch.save`d state dict.

    Raises:
        ExportError: the file holds more than tensors (hostile, or a pickled model), is damaged, or is not a dict.
    """
    try:
        loaded = read_pickle(path)
    except CheckpointError as error:
        hint = error.hint or "download it again"
        raise ExportError(error.what, where=error.where, why=error.why, hint=hint) from None
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise ExportError("the weight file is not a state dict", where=str(path), why=f"it holds a {type(loaded).__name__}")
    return {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}


def load_foreign_safetensors(path: Path) -> dict[str, Tensor]:
    """Load all tensors of one safetensors file; a truncated file or another format raises ExportError."""
    try:
        with safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - safe_open is no mapping
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise ExportError(
            "the weight file cannot be read", where=str(path), why=_line(error), hint="download it again"
        ) from None


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a folder of another project; a damaged file raises ExportError."""
    try:
        value = files.read_json(path)
    except (OSError, ValueError) as error:
        raise ExportError(f"{path.name} cannot be read", where=str(path), why=str(error)) from None
    if not isinstance(value, dict):
        raise ExportError(f"{path.name} is not a JSON object", where=str(path))
    return value


def foreign_settings(config_class: Callable[..., Any], fields: Mapping[str, Any]) -> Any:
    """Create a config object of transformers from the fields of a config.json.

    Raises:
        ExportError: it refuses a value. The exception types for wrong values are undocumented and differ by release.
    """
    try:
        return config_class(**fields)
    except Exception as error:
        raise ExportError("config.json does not describe a model", why=" ".join(str(error).split()) or repr(error)) from None


def inner_file(folder: Path, name: str) -> Path:
    """The path of a file inside a folder of another project; links out of the folder are only allowed in the Hub's cache.

    A snapshot of the cache (`models--O--N/snapshots/REVISION`) links to `models--O--N/blobs`; elsewhere a link must stay in the
    folder. Weights and tokenizers are copied into the output, so an arbitrary link could publish any file.

    Raises:
        ExportError: the file is outside the folder, is not a regular file, or links to itself.
    """
    path, root = folder / name, folder.resolve()
    homes = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith(("models--", "datasets--", "spaces--")):
        homes.append(root.parent.parent / "blobs")
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ExportError(f"{name} cannot be read", where=str(path), why=_line(error)) from None
    if not any(target.is_relative_to(home) for home in homes):
        hint = "copy the file itself into the folder"
        raise ExportError(f"{name} links to a file outside the folder", where=str(path), why=str(target), hint=hint)
    if not target.is_file():
        raise ExportError(f"{name} is not a regular file", where=str(path))
    return path


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a Hugging Face folder, safetensors before pickles.

    Raises:
        ExportError: there are none, shards are missing, or the index or a link points outside the folder.
    """
    for single, index in zip(_SINGLE, _INDEX, strict=True):
        if (folder / single).is_file():
            return [inner_file(folder, single)]
        if (folder / index).is_file():
            return [inner_file(folder, name) for name in _shards(folder, index)]
    raise ExportError(
        "no weights in this folder",
        where=str(folder),
        why=f"looked for {', '.join((*_SINGLE, *_INDEX))}",
        hint="give the folder that holds config.json and the weights",
    )


def _shards(folder: Path, index: str) -> list[str]:
    """The names of the shards, which must all exist."""
    table = read_json(inner_file(folder, index)).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        reason = "weight_map is not a table of tensors and file names"
        raise ExportError("the shard index is damaged", where=str(folder / index), why=reason, hint="download it again")
    names = sorted(set(table.values()))
    outside = [name for name in names if Path(name).name != name or "\0" in name or not name.endswith((".safetensors", ".bin"))]
    if outside:
        reason = f"{outside[0]!r:.80} is not the name of a weight file in it"
        raise ExportError("the shard index points outside the folder", where=str(folder / index), why=reason)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        few = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        hint = "download the folder again, all shards"
        raise ExportError(
            "shards of the model are missing", where=str(folder), why=f"{index} names {few or 'no file'}", hint=hint
        )
    return names


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Name -> tensor of every weight in a Hugging Face folder (any of the four layouts), on the CPU."""
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        shard = load_foreign_safetensors(path) if path.suffix == ".safetensors" else load_foreign_pickle(path)
        weights.update(shard)
    return weights
