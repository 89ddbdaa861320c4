"""The tokenizer that lies in a checkpoint is found again, with its kind recorded or told by its files."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest

from megatron.data.tokenizers import build_tokenizer
from megatron.errors import DataError
from megatron.generation.load import stored_tokenizer
from tests.data.hf_files import backend, write


def rank_file(folder: Path, name: str) -> Path:
    path = folder / name
    path.write_text("".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)))
    (folder / f"{name}.json").write_text(json.dumps({"special_tokens": {"<|endoftext|>": 300}}))
    return path


def test_rank_file_with_its_settings(tmp_path: Path) -> None:
    rank_file(tmp_path, "a_rather_long_name.tiktoken")
    for kind in ("TiktokenTokenizer", None):
        found = stored_tokenizer(tmp_path, kind)
        assert found is not None and (found.name, found.eod, found.vocab_size) == ("TiktokenTokenizer", 300, 301)


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_gpt2_pair(names: tuple[str, str], tmp_path: Path) -> None:
    backend().model.save(str(tmp_path))
    for made, name in zip(("vocab.json", "merges.txt"), names, strict=True):
        (tmp_path / made).rename(tmp_path / name)
    for kind in ("GPT2BPETokenizer", None):
        found = stored_tokenizer(tmp_path, kind)
        assert found is not None and found.name == "GPT2BPETokenizer"
        assert found.fingerprint() == build_tokenizer(found.name, *(tmp_path / name for name in names)).fingerprint()


def test_hugging_face_folder(tmp_path: Path) -> None:
    """Its settings sort before tokenizer.json and are not taken for it."""
    write(tmp_path / "tokenizer.json")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|padding|>"}))
    for kind in ("HFGPT2Tokenizer", None):
        found = stored_tokenizer(tmp_path, kind)
        assert found is not None and (found.name, found.eod) == ("HFGPT2Tokenizer", 1)


def test_one_json(tmp_path: Path) -> None:
    for name in ("words.json", "words"):  # a name without a suffix is one, too
        shutil.rmtree(tmp_path / "t", ignore_errors=True)
        (tmp_path / "t").mkdir()
        write(tmp_path / "t" / name)
        found = stored_tokenizer(tmp_path / "t", "HFTokenizer")
        assert found is not None and found.vocab_size == 270


def test_nothing_and_damage(tmp_path: Path) -> None:
    assert stored_tokenizer(tmp_path / "absent") is None and stored_tokenizer(tmp_path) is None
    assert stored_tokenizer(tmp_path, "HFTokenizer") is None
    bytes_of = stored_tokenizer(tmp_path / "absent", "CharLevelTokenizer")
    assert bytes_of is not None and bytes_of.vocab_size == 512
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(DataError, match="needs merge_file"):
        stored_tokenizer(tmp_path, "GPT2BPETokenizer")
