"""Weights written by others: safetensors (single or sharded) and `pytorch_model.bin`, read without running anything in them.

A `.bin` file is a pickle; `checkpoint/foreign.py` reads it through torch's restricted unpickler.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.checkpoint.foreign import read_pickle
from megatron.errors import CheckpointError, ExportError

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
    except (SafetensorError, OSError) as error:
        raise ExportError(
            "the weight file cannot be read", where=str(path), why=str(error).splitlines()[0], hint="download it again"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a foreign folder; a damaged file raises ExportError with its place."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path.name} cannot be read", where=str(path), why=str(error)) from None
    if not isinstance(value, dict):
        raise ExportError(f"{path.name} is not a JSON object", where=str(path))
    return value


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a Hugging Face folder, safetensors before pickles; none raises ExportError."""
    for single, index in zip(_SINGLE, _INDEX, strict=True):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            names = sorted(set(map(str, read_json(folder / index).get("weight_map", {}).values())))
            outside = [name for name in names if Path(name).name != name]
            if outside:
                raise ExportError("the shard index points outside the folder", where=str(folder / index), why=outside[0])
            missing = [name for name in names if not (folder / name).is_file()]
            if missing or not names:
                raise ExportError(
                    "shards of the model are missing",
                    where=str(folder),
                    why=f"{index} names {', '.join(missing) or 'no file'}",
                    hint="download the folder again, all shards",
                )
            return [folder / name for name in names]
    raise ExportError(
        "no weights in this folder",
        where=str(folder),
        why=f"looked for {', '.join((*_SINGLE, *_INDEX))}",
        hint="give the folder that holds config.json and the weights",
    )


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Name -> tensor of every weight in a Hugging Face folder (any of the four layouts), on the CPU."""
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        part = load_foreign_safetensors(path) if path.suffix == ".safetensors" else load_foreign_pickle(path)
        weights.update(part)
    return weights
