"""Tokenizers: NeoX's ids (through the preprocessed golden files, see test_encode), lossless text, clear errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.tokenizers import Tokenizer, build_tokenizer, padded_vocab_size
from megatron.errors import DataError

TEXT = "def f(x):\n\treturn  'naïve' # 漢字 👩‍👩‍👧 <|padding|>\r\n"


def _build(kind: str, golden: Path) -> Tokenizer:
    folder = golden / "tokenizers"
    files: dict[str, tuple[Path | None, Path | None]] = {
        "HFTokenizer": (folder / "bpe_tokenizer.json", None),
        "GPT2BPETokenizer": (folder / "gpt2_vocab.json", folder / "gpt2_merges.txt"),
        "SPMTokenizer": (folder / "spm_eod.model", None),
        "CharLevelTokenizer": (None, None),
    }
    return build_tokenizer(kind, *files[kind])


@pytest.mark.parametrize(
    ("kind", "size", "eod", "pad"),
    [("HFTokenizer", 600, 0, 1), ("GPT2BPETokenizer", 600, 0, 1), ("CharLevelTokenizer", 512, 0, 1)],
)
def test_face(kind: str, size: int, eod: int, pad: int, golden: Path) -> None:
    tokenizer = _build(kind, golden)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (kind, size, eod, pad)
    assert tokenizer.detokenize(tokenizer.tokenize(TEXT)) == TEXT
    texts = [TEXT, "", "a b", "<|endoftext|>"]
    assert tokenizer.tokenize_batch(texts) == [tokenizer.tokenize(text) for text in texts]
    assert all(path.is_file() for path in tokenizer.files())


def test_sentencepiece(golden: Path) -> None:
    tokenizer = _build("SPMTokenizer", golden)
    assert tokenizer.detokenize(tokenizer.tokenize("hello the world")) == "hello the world"
    assert tokenizer.eod > 0
    plain = build_tokenizer("SPMTokenizer", golden / "tokenizers/spm_plain.model")
    assert plain.eod == 0  # the unknown id, as in NeoX
    assert plain.fingerprint() != tokenizer.fingerprint()


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_bytes_are_lossless(text: str) -> None:
    tokenizer = build_tokenizer("CharLevelTokenizer")
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
    assert tokenizer.detokenize([511, 1]) == "\ufffd\x01"


def test_special_text_is_special_only_where_neox_says_so(golden: Path) -> None:
    assert _build("HFTokenizer", golden).tokenize("<|padding|>") == [1]
    gpt2 = _build("GPT2BPETokenizer", golden)
    assert gpt2.tokenize("<|endoftext|>") == [0] and len(gpt2.tokenize("<|padding|>")) > 1


def test_fingerprint_follows_content_not_place(golden: Path, tmp_path: Path) -> None:
    source = golden / "tokenizers/bpe_tokenizer.json"
    copy = tmp_path / "elsewhere" / source.name
    copy.parent.mkdir()
    shutil.copyfile(source, copy)
    original = build_tokenizer("HFTokenizer", source)
    assert build_tokenizer("hftokenizer", copy).fingerprint() == original.fingerprint()
    copy.write_text(source.read_text() + "\n")
    assert build_tokenizer("HFTokenizer", copy).fingerprint() != original.fingerprint()


def test_hf_folder(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer"):
        build_tokenizer("HFGPT2Tokenizer", tmp_path)
    with pytest.raises(DataError, match="folder"):
        build_tokenizer("HFGPT2Tokenizer", "gpt2")
    shutil.copyfile(golden / "tokenizers/gpt2_vocab.json", tmp_path / "vocab.json")
    shutil.copyfile(golden / "tokenizers/gpt2_merges.txt", tmp_path / "merges.txt")
    pair = build_tokenizer("HFGPT2Tokenizer", tmp_path)
    assert pair.tokenize("the thing") == _build("GPT2BPETokenizer", golden).tokenize("the thing")
    shutil.copyfile(golden / "tokenizers/bpe_tokenizer.json", tmp_path / "tokenizer.json")
    settings_file = tmp_path / "tokenizer_config.json"
    settings_file.write_text(json.dumps({"eos_token": {"content": "<|padding|>"}, "pad_token": "[PAD]"}))
    whole = build_tokenizer("HFGPT2Tokenizer", tmp_path)
    assert (whole.eod, whole.pad, whole.vocab_size) == (1, 600, 601)
    assert settings_file in whole.files()
    settings_file.write_text("[")
    with pytest.raises(DataError, match="settings"):
        build_tokenizer("HFGPT2Tokenizer", tmp_path)


def test_mistakes_are_named(golden: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("{}")
    folder = golden / "tokenizers"
    for arguments, message in (
        (("NoSuchTokenizer",), "unknown"),
        (("TiktokenTokenizer", "cl100k_base"), "cannot be read"),
        (("TiktokenTokenizer", wrong), "not a token and its rank"),
        (("HFTokenizer",), "vocab_file"),
        (("HFTokenizer", tmp_path / "absent"), "cannot be read"),
        (("HFTokenizer", tmp_path), "cannot be read"),
        (("HFTokenizer", wrong), "not a tokenizers JSON"),
        (("HFTokenizer", folder / "spm_eod.model"), "not a tokenizers JSON"),
        (("SPMTokenizer", folder / "bpe_tokenizer.json"), "not a SentencePiece model"),
        (("GPT2BPETokenizer", folder / "gpt2_vocab.json"), "merge_file"),
        (("GPT2BPETokenizer", wrong, folder / "gpt2_merges.txt"), "GPT-2 vocabulary"),
    ):
        with pytest.raises(DataError, match=message):
            build_tokenizer(*arguments)


def test_tokenizer_without_eod_is_named_when_it_is_needed(golden: Path, tmp_path: Path) -> None:
    content = (golden / "tokenizers/bpe_tokenizer.json").read_text().replace("<|endoftext|>", "<|other|>")
    (tmp_path / "t.json").write_text(content)
    tokenizer = build_tokenizer("HFTokenizer", tmp_path / "t.json")
    assert tokenizer.tokenize("the")
    with pytest.raises(DataError, match="endoftext"):
        _ = tokenizer.eod


def test_padded_sizes_are_those_of_neox(golden_json: Callable[[str], Any]) -> None:
    rows = golden_json("padded_vocab.json")["rows"]
    assert len(rows) == 675
    for size, divisible_by, tensor_parallel, padded in rows:
        assert padded_vocab_size(size, divisible_by, tensor_parallel) == padded
