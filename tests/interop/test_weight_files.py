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
from transformers import LlamaConfig

from megatron.checkpoint.load import read_full_weights
from megatron.errors import ExportError
from megatron.export.hf import export_checkpoint
from megatron.interop.import_hf import import_folder
from megatron.interop.weight_files import foreign_settings, read_weights

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one export of all tests lies, once it is made."""
    return tmp_path_factory.mktemp("original") / "hf"


@pytest.fixture
def folder(make_checkpoint: Make, original: Path, tmp_path: Path) -> Path:
    if not original.exists():
        export_checkpoint(make_checkpoint(tie_embeddings=False), original)
    return Path(shutil.copytree(original, tmp_path / "hf"))


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


def test_a_link_out_of_the_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    """Weights, settings and tokenizers alike: what a link names would be copied into what is written."""
    secret = tmp_path / "secret"
    for name in ("model.safetensors", "config.json"):
        shutil.move(folder / name, secret)
        (folder / name).symlink_to(secret)
        with pytest.raises(ExportError, match="outside the folder") as caught:
            import_folder(folder, tmp_path / "back")
        assert str(secret) in str(caught.value)
        (folder / name).unlink()
        shutil.move(secret, folder / name)
    secret.write_text("{}")
    (folder / "tokenizer.json").unlink(missing_ok=True)
    (folder / "tokenizer.json").symlink_to(secret)
    with pytest.raises(ExportError, match="tokenizer.json links to a file outside"):
        import_folder(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_snapshot_of_the_hub_cache_links_to_its_blobs(folder: Path, tmp_path: Path) -> None:
    """`models--O--N/snapshots/REVISION/FILE` is a link to `../../blobs/HASH`; other folders of the cache are not its own."""
    cache = tmp_path / "hub" / "models--me--mine"
    snapshot, blobs = cache / "snapshots" / "0123abc", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in [path for path in folder.iterdir() if path.is_file()]:
        shutil.copy(file, blobs / f"hash-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"hash-{file.name}")
    assert set(read_weights(snapshot)) == set(read_weights(folder))
    assert import_folder(snapshot, tmp_path / "back").checkpoint.is_dir()
    other = tmp_path / "hub" / "models--you--yours" / "blobs"
    other.mkdir(parents=True)
    shutil.move(blobs / "hash-model.safetensors", other / "hash")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(other / "hash")
    with pytest.raises(ExportError, match="outside the folder"):
        read_weights(snapshot)


def test_links_within_the_folder_and_to_themselves(folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    assert read_weights(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")
    with pytest.raises(ExportError, match=r"config.json"):
        import_folder(folder, folder.parent / "back")


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 70 + "1" + "}" * 70, '{"a": ' + "9" * 5000 + "}", '{"a": "\\ud800"}', "\xff", "", "nothing"],
    ids=["deep", "deep but parsed", "5,000 digits", "half a surrogate", "not UTF-8", "empty", "no JSON"],
)
def test_json_that_nobody_wrote(folder: Path, text: str) -> None:
    """One message with the file's name, for settings and for the index of the shards."""
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ExportError, match=r"config\.json cannot be read"):
        import_folder(folder, folder.parent / "back")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ExportError, match=r"index\.json cannot be read"):
        read_weights(folder)


@pytest.mark.parametrize(
    "table", [None, [], "x", {"a": 3}, {"a": ["model.safetensors"]}, {"a": "config.json"}, {"a": "x\0"}], ids=repr
)
def test_a_weight_map_of_the_wrong_kind(folder: Path, table: Any) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(ExportError, match="shard index"):
        read_weights(folder)


@pytest.mark.parametrize(
    ("name", "value"), [("num_hidden_layers", 10**9), ("decoder_layers", "two"), ("eos_token_id", 1 << 60)]
)
def test_sizes_that_no_model_has(folder: Path, name: str, value: Any) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, name: value}))
    with pytest.raises(ExportError, match=f"{name} is .{{0,1}}{value}"):
        import_folder(folder, folder.parent / "back")


@pytest.mark.parametrize("length", [0, 1, 1 << 40, (1 << 64) - 1])
def test_headers_of_safetensors_that_lie(folder: Path, length: int) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + whole[8:])
    with pytest.raises(ExportError, match="cannot be read"):
        read_weights(folder)


def test_what_transformers_refuses_is_one_message() -> None:
    """Its exceptions for a wrong value are of many kinds, some of no common class."""
    for settings in ({"rms_norm_eps": "../x"}, {"num_attention_heads": 0}, {"rope_parameters": 7}, {"hidden_size": [[]]}):
        with pytest.raises(ExportError, match="does not describe a model"):
            foreign_settings(LlamaConfig, settings)
