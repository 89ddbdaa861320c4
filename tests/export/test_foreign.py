"""Weight files of others: every layout is read, nothing in them runs, and each defect is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.checkpoint.load import read_full_weights
from megatron.errors import ExportError
from megatron.export.foreign import read_weights
from megatron.export.hf import export_checkpoint
from megatron.export.importer import import_folder

Make = Callable[..., Path]


@pytest.fixture
def folder(make_checkpoint: Make, tmp_path: Path) -> Path:
    return export_checkpoint(make_checkpoint(tie_embeddings=False), tmp_path / "hf").folder


def as_pickle(folder: Path) -> None:
    """The released layout of older models: one `pytorch_model.bin`."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_shards(folder: Path, kind: str) -> None:
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    suffix, stem = (".safetensors", "model") if kind == "safetensors" else (".bin", "pytorch_model")
    where = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-{number:05d}-of-00002{suffix}"
        chosen = {n: weights[n] for n in part}
        if kind == "safetensors":
            save_file(chosen, folder / file)
        else:
            torch.save(chosen, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("layout", ["bin", "safetensors shards", "bin shards"])
def test_every_layout(folder: Path, tmp_path: Path, layout: str) -> None:
    want = load_file(folder / "model.safetensors")
    if layout == "bin":
        as_pickle(folder)
    else:
        as_shards(folder, layout.split()[0])
    got = read_full_weights(import_folder(folder, tmp_path / "back").checkpoint)
    assert set(got) == set(want) and all(torch.equal(got[n], want[n]) for n in want)


class _Hostile:
    """Runs a command when an ordinary unpickler meets it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_a_hostile_pickle_does_not_run(folder: Path, tmp_path: Path) -> None:
    weights: dict[str, Any] = dict(load_file(folder / "model.safetensors"))
    weights["extra"] = _Hostile(tmp_path / "ran")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ExportError, match="not run"):
        import_folder(folder, tmp_path / "back")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "back").exists()


def test_damaged_files(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ExportError, match="cannot be read"):
        read_weights(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(whole[:1000])
    with pytest.raises(ExportError):
        read_weights(folder)
    (folder / "pytorch_model.bin").unlink()
    torch.save([1, 2], folder / "pytorch_model.bin")
    with pytest.raises(ExportError, match="not a state dict"):
        read_weights(folder)


@pytest.mark.parametrize(
    ("weight_map", "word"),
    [({"a": "../outside.safetensors"}, "outside"), ({"a": "gone.safetensors"}, "missing"), ({}, "missing")],
)
def test_bad_shard_index(folder: Path, weight_map: dict[str, str], word: str) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ExportError, match=word):
        read_weights(folder)


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ExportError, match="no weights"):
        read_weights(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ExportError, match="not a JSON object"):
        import_folder(folder, folder.parent / "back")
