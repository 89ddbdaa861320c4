"""Weights written by others: safetensors (single or sharded) and `pytorch_model.bin`, read without running anything in them.

A `.bin` file is a pickle; `interop/neox_files.py` reads it through torch's restricted unpickler.
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
    """Tensors of a foreign `torch.save`d state dict.

    Raises:
        ExportError: the file wants more than tensors (hostile or a whole pickled model), is damaged, or is not a dict.
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
    """All tensors of one safetensors file; a truncated or foreign-format file raises ExportError."""
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
    """One JSON object from a foreign folder; a damaged file raises ExportError with its place."""
    try:
        value = files.read_json(path)
    except (OSError, ValueError) as error:
        raise ExportError(f"{path.name} cannot be read", where=str(path), why=str(error)) from None
    if not isinstance(value, dict):
        raise ExportError(f"{path.name} is not a JSON object", where=str(path))
    return value


def foreign_settings(config_class: Callable[..., Any], said: Mapping[str, Any]) -> Any:
    """The configuration object of transformers from what a config.json says.

    Raises:
        ExportError: it refuses a value. Which exception comes of a wrong one is not documented and differs by release.
    """
    try:
        return config_class(**said)
    except Exception as error:
        raise ExportError("config.json does not describe a model", why=" ".join(str(error).split()) or repr(error)) from None


def inner_file(folder: Path, name: str) -> Path:
    """The file `name` of a foreign folder, which may be a link only where the Hub's cache makes one.

    A snapshot of the cache (`models--O--N/snapshots/REVISION`) links to `models--O--N/blobs`; elsewhere a link must end in the
    folder itself. Weights and tokenizers end up in what is written, so a link to anywhere would publish any file.

    Raises:
        ExportError: it leads out of the folder, is no regular file, or links to itself.
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
        ExportError: there are none, shards are missing, or the index or a link leads out of the folder.
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
    """The names of the shards, all of them there."""
    table = read_json(inner_file(folder, index)).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        why = "weight_map is not a table of tensors and file names"
        raise ExportError("the shard index is damaged", where=str(folder / index), why=why, hint="download it again")
    names = sorted(set(table.values()))
    outside = [name for name in names if Path(name).name != name or "\0" in name or not name.endswith((".safetensors", ".bin"))]
    if outside:
        why = f"{outside[0]!r:.80} is not the name of a weight file in it"
        raise ExportError("the shard index points outside the folder", where=str(folder / index), why=why)
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
        part = load_foreign_safetensors(path) if path.suffix == ".safetensors" else load_foreign_pickle(path)
        weights.update(part)
    return weights
