"""Models of the Hub by name, with a folder in place of the Hub: what is imported, what is read as it is, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from megatron.errors import ConfigError, DataError, ExportError
from megatron.evaluation.hub_models import fetch, is_hub_name
from tests.evaluation.tiny import tiny_config, trained_checkpoint
from tools import launch_eval as tool


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder OWNER/NAME/REVISION in place of the Hub; `asked` lists what was fetched."""
    root = tmp_path / "hub"

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        found = sorted((root / name).glob("*"))
        if not found:
            raise LocalEntryNotFoundError(f"no snapshot of {name}\nand more")
        return str(found[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return root


def _config(hub: Path, name: str, values: Any) -> Path:
    folder = hub / name / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("hazyresearch/based-360m", True),
        ("runs/a/b", False),
        ("/a/b", False),
        ("./b", False),
        ("based", False),
        ("a/b c", False),
    ],
)
def test_what_can_be_a_name_of_the_hub(word: str, expected: bool) -> None:
    assert is_hub_name(word) is expected


def test_names_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/a").mkdir(parents=True)  # a folder that is there is that folder
    local, hub, mine = tool.named(["runs/a", "hazyresearch/based-360m", "m=hazyresearch/mamba-360m"])
    assert (local.path, local.hub) == (tmp_path / "runs/a", None)
    assert (hub.name, hub.hub) == ("hazyresearch-based-360m", "hazyresearch/based-360m")
    assert (mine.name, mine.hub) == ("m", "hazyresearch/mamba-360m")
    words = ["--task", "swde", "--task", "fda", "--model", "hazyresearch/based-360m", "--model", "hazyresearch/mamba-360m"]
    found = tool.parser().parse_args([*words, "--limit=100", "-p"])  # as the Based document types it
    assert (found.task, found.model, found.limit) == (["swde", "fda"], words[5::2], 100)


def test_kinds_of_transformers_are_read_where_they_lie(hub: Path, tmp_path: Path) -> None:
    folder = _config(hub, "a/llama", {"model_type": "llama"})
    assert fetch("a/llama", tmp_path / "out") == folder and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("a/code", {"model_type": "odd", "auto_map": {"AutoModel": "m.M"}}, "needs code of its repository"),
        ("a/bad", "{", "no config.json that can be read"),
        ("a/deep", "[" * 100_000, "no config.json that can be read"),
        ("a/list", [1], "is no object"),
    ],
)
def test_what_is_refused(hub: Path, tmp_path: Path, name: str, values: Any, message: str) -> None:
    _config(hub, name, values)
    with pytest.raises(DataError, match=message):
        fetch(name, tmp_path)


def test_a_name_that_is_neither_folder_nor_model(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder a/none, and the Hub does not give") as caught:
        fetch("a/none", tmp_path)
    assert caught.value.why == "no snapshot of a/none"
    with pytest.raises(ConfigError, match="no model folder"):
        tool.named(["a/none/more"])


def test_our_own_kinds_are_imported_once_and_none_of_their_code_is_run(hub: Path, tmp_path: Path) -> None:
    from megatron.export.hf import export_checkpoint

    checkpoint = trained_checkpoint(tmp_path / "runs", tiny_config("metala"), steps=1)
    folder = hub / "me/tiny" / "abc"
    folder.parent.mkdir(parents=True)
    export_checkpoint(checkpoint, folder)
    for path in folder.glob("*.py"):
        path.write_text("raise SystemExit('run')\n")
    place = fetch("me/tiny", tmp_path / "out")
    assert place == tmp_path / "out/imported/me--tiny-abc"
    manifest = place / "global_step0" / "manifest.json"
    assert manifest.is_file() and (place / "global_step0/tokenizer").is_dir()
    written = manifest.stat().st_mtime_ns
    assert fetch("me/tiny", tmp_path / "out") == place and manifest.stat().st_mtime_ns == written
    assert [path.name for path in place.parent.iterdir()] == [place.name], "nothing is left beside it"


def test_an_import_that_fails_leaves_nothing(hub: Path, tmp_path: Path) -> None:
    _config(hub, "me/broken", {"model_type": "metala"})
    with pytest.raises(ExportError):
        fetch("me/broken", tmp_path / "out")
    assert not list((tmp_path / "out/imported").iterdir())


def test_released_models_get_the_tokenizer_that_their_card_names(hub: Path, tmp_path: Path, monkeypatch: Any) -> None:
    folder = _config(hub, "hazyresearch/based-360m", {"n_embd": 8, "mixer": {}})
    (folder / "pytorch_model.bin").write_bytes(b"")
    gpt2 = hub / "gpt2" / "rev"
    gpt2.mkdir(parents=True)
    (gpt2 / "tokenizer.json").write_text("{}")
    seen: list[tuple[Path, Path | None]] = []

    def import_folder(source: Path, output: Path, *, tokenizer: Path | None = None) -> None:
        seen.append((source, tokenizer))
        output.mkdir()
        (output / "latest").write_text("global_step0")

    monkeypatch.setattr("megatron.interop.import_hf.import_folder", import_folder)
    fetch("hazyresearch/based-360m", tmp_path / "out")
    assert seen == [(folder, gpt2)]
