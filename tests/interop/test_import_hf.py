"""Imports: sizes come from the tensors, what was inferred is said, and a folder that is no such model is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.manifest import read_manifest
from megatron.errors import ExportError
from megatron.export.hf import export_checkpoint
from megatron.interop.import_hf import import_folder

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one export of all tests lies, once it is made."""
    return tmp_path_factory.mktemp("original") / "hf"


@pytest.fixture
def folder(make_checkpoint: Make, original: Path, tmp_path: Path) -> Path:
    if not original.exists():
        facts = {"tokenizer": {"vocab_size": 64, "eod": 3, "pad": 5, "bos": 4}}
        export_checkpoint(make_checkpoint(facts=facts), original)
    return Path(shutil.copytree(original, tmp_path / "hf"))


def change(folder: Path, **fields: Any) -> None:
    """Set fields of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text())
    config |= fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def reweigh(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file({n: t.contiguous() for n, t in weights.items()}, folder / "model.safetensors")


def test_a_checkpoint_to_go_on_from(folder: Path, tmp_path: Path) -> None:
    made = import_folder(folder, tmp_path / "ck")
    assert find_checkpoint(tmp_path / "ck") == made.checkpoint and made.checkpoint.name == "global_step0"
    assert (tmp_path / "ck" / "latest").read_text().strip() == "global_step0"
    manifest = read_manifest(made.checkpoint)
    assert manifest.facts["tokenizer"] == {"vocab_size": 64, "eod": 3, "pad": 5, "bos": 4}
    assert not manifest.optimizer and (made.checkpoint / "configs" / "config.json").is_file()
    again = export_checkpoint(made.checkpoint, tmp_path / "again")
    first, second = (json.loads((f / "config.json").read_text()) for f in (folder, again.folder))
    assert first == second
    for name in ("model.safetensors", "modeling_metala.py", "configuration_metala.py", "generation_config.json"):
        assert (folder / name).read_bytes() == (again.folder / name).read_bytes(), name


def test_sizes_are_read_from_the_tensors(folder: Path, tmp_path: Path) -> None:
    change(folder, glu_dim=-1, decoder_layers=9, vocab_size=60, decoder_embed_dim=None)
    made = import_folder(folder, tmp_path / "ck")
    shape = made.config
    assert (shape.mlp_width, shape.num_layers, shape.vocab_size, shape.hidden_size) == (48, 2, 64, 32)
    for word in ("glu_dim = 48", "decoder_layers = 2", "vocab_size = 64", "decoder_embed_dim = 32"):
        assert any(word in note for note in made.notes), word


def test_tied_or_not(folder: Path, tmp_path: Path) -> None:
    change(folder, tie_word_embeddings=False)
    made = import_folder(folder, tmp_path / "missing")
    assert made.config.tie_embeddings and any("config.json says untied" in note for note in made.notes)
    change(folder, tie_word_embeddings=True)
    reweigh(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    made = import_folder(folder, tmp_path / "copy")
    assert made.config.tie_embeddings and any("copy of the embedding" in note for note in made.notes)
    reweigh(folder, lambda w: w["lm_head.weight"].mul_(2))
    made = import_folder(folder, tmp_path / "own")
    assert not made.config.tie_embeddings and any("differs from the embedding" in note for note in made.notes)


def test_unknown_activation_is_the_identity(folder: Path, tmp_path: Path) -> None:
    change(folder, glu_act="softplus")
    made = import_folder(folder, tmp_path / "ck")
    assert made.config.activation == "identity" and any("identity" in note for note in made.notes)
    change(folder, glu_act="exp")
    with pytest.raises(ExportError, match="does not describe"):
        import_folder(folder, tmp_path / "ck2")


def test_tokenizer_is_copied(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "words.tiktoken"):
        (folder / name).write_text("{}")
    made = import_folder(folder, tmp_path / "ck")
    assert len(list((made.checkpoint / "tokenizer").iterdir())) == 3
    again = export_checkpoint(made.checkpoint, tmp_path / "again")
    assert (again.folder / "words.tiktoken").is_file() and any("lie in the folder as they were" in n for n in again.notes)


def test_a_tokenizer_that_lies_elsewhere(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "tokenizer.json").write_text("{}")
    made = import_folder(folder, tmp_path / "with", tokenizer=elsewhere)
    assert [path.name for path in (made.checkpoint / "tokenizer").iterdir()] == ["tokenizer.json"]
    assert read_manifest(made.checkpoint).facts["tokenizer"]["type"] == "HFGPT2Tokenizer"


def test_special_ids_outside_the_vocabulary_are_left_out(folder: Path, tmp_path: Path) -> None:
    change(folder, eos_token_id=5, pad_token_id=-1, bos_token_id=4096)
    made = import_folder(folder, tmp_path / "ck")
    facts = read_manifest(made.checkpoint).facts["tokenizer"]
    assert facts == {"vocab_size": made.config.vocab_size, "eod": 5}
    assert [note.split(" of ")[0] for note in made.notes if "does not have" in note] == ["pad_token_id", "bos_token_id"]


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (lambda w: w.pop("model.layers.1.token_mixer.k_gate.weight"), "missing: model.layers.1.token_mixer.k_gate"),
        (lambda w: w.update({"model.extra": torch.ones(2)}), "unknown: model.extra"),
        (lambda w: w.update({"model.layers.1.token_mixer.aug_balance": torch.ones(3)}), "aug_balance is"),
        (lambda w: w.pop("model.embed_tokens.weight"), "model.embed_tokens.weight"),
    ],
)
def test_weights_that_do_not_fit(folder: Path, tmp_path: Path, edit: Any, word: str) -> None:
    reweigh(folder, edit)
    with pytest.raises(ExportError) as caught:
        import_folder(folder, tmp_path / "ck")
    assert word in str(caught.value) and not (tmp_path / "ck").exists()


def test_wrong_folders(folder: Path, tmp_path: Path, make_checkpoint: Make) -> None:
    with pytest.raises(ExportError, match="no such folder"):
        import_folder(tmp_path / "nowhere", tmp_path / "ck")
    with pytest.raises(ExportError, match="checkpoint of ours"):
        import_folder(make_checkpoint(name="other"), tmp_path / "ck")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match=r"config\.json is missing"):
        import_folder(tmp_path / "empty", tmp_path / "ck")
    change(folder, decoder_attention_heads=None)
    with pytest.raises(ExportError, match="decoder_attention_heads|does not describe"):
        import_folder(folder, tmp_path / "ck")
    change(folder, decoder_attention_heads=3)
    with pytest.raises(ExportError, match="do not make a model"):
        import_folder(folder, tmp_path / "ck")
    change(folder, model_type="opt")
    with pytest.raises(ExportError, match="'opt' cannot be imported"):
        import_folder(folder, tmp_path / "ck")
