"""Tokenizers: NeoX's ids (through the preprocessed golden files, see test_encode), lossless text, clear errors."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.tokenizers import Tokenizer, build_tokenizer, padded_vocab_size
from megatron.data.train_tokenizer import train_to_file
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
    assert tokenizer.tokenize_prompt(TEXT) == tokenizer.tokenize_piece(TEXT) == tokenizer.tokenize(TEXT)
    assert all(path.is_file() for path in tokenizer.files())


def test_sentencepiece(golden: Path) -> None:
    tokenizer = _build("SPMTokenizer", golden)
    assert tokenizer.detokenize(tokenizer.tokenize("hello the world")) == "hello the world"
    assert tokenizer.eod > 0
    # the model has begin and end pieces; they are nobody's template
    assert tokenizer.tokenize_prompt("the") == tokenizer.tokenize_piece("the") == tokenizer.tokenize("the")
    assert {1, 2}.isdisjoint(tokenizer.tokenize("the")) and tokenizer.remarks(append_eod=True) == []
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


def _rank_file(path: Path, extra: Sequence[bytes] = (b"th", b"the", b" the", b"\xc3\xa9"), shift: int = 0) -> Path:
    tokens = [*(bytes([byte]) for byte in range(256)), *extra]
    lines = (f"{base64.b64encode(token).decode()} {rank + shift}\n" for rank, token in enumerate(tokens))
    path.write_text("".join(lines))
    return path


def test_rank_file(tmp_path: Path) -> None:
    plain = build_tokenizer("TiktokenTokenizer", _rank_file(tmp_path / "small.tiktoken"))
    assert (plain.name, plain.vocab_size, plain.eod, plain.pad) == ("TiktokenTokenizer", 261, 260, 260)
    assert plain.tokenize("the the<|endoftext|>é") == [257, 258, 260, 259]
    assert plain.tokenize_batch([TEXT, ""]) == [plain.tokenize(TEXT), []]
    assert plain.tokenize_prompt(TEXT) == plain.tokenize_piece(TEXT) == plain.tokenize(TEXT)
    assert plain.detokenize(plain.tokenize(TEXT)) == TEXT
    side = tmp_path / "small.tiktoken.json"
    special = {"<|endoftext|>": 270, "<|padding|>": 265}
    side.write_text(json.dumps({"special_tokens": special, "vocab_size": 280, "pattern": r"\w+|\W+"}))
    full = build_tokenizer("TiktokenTokenizer", tmp_path / "small.tiktoken")
    assert (full.vocab_size, full.eod, full.pad) == (280, 270, 265) and side in full.files()
    assert full.fingerprint() != plain.fingerprint()
    assert full.detokenize([257, 261, 270, 279]) == "the\ufffd<|endoftext|>\ufffd"


@settings(max_examples=50, deadline=None)
@given(text=st.text())
def test_rank_file_is_lossless(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "lossless.tiktoken"
    tokenizer = build_tokenizer("TiktokenTokenizer", path if path.exists() else _rank_file(path))
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


def test_a_file_of_the_released_size(tmp_path: Path) -> None:
    """100,256 ranks: the vocabulary of the MetaLA models, 100,280 with its special and reserved ids."""
    extra = [bytes([a, b]) for a in range(256) for b in range(256)]
    extra += [bytes([1 + i % 250, 1 + i // 250, 7]) for i in range(100_256 - 256 - 65_536)]
    tokenizer = build_tokenizer("TiktokenTokenizer", _rank_file(tmp_path / "k.tiktoken", extra))
    assert (tokenizer.vocab_size, tokenizer.eod) == (100280, 100257)
    assert tokenizer.tokenize("<|endofprompt|>") == [100276] and tokenizer.detokenize(tokenizer.tokenize(TEXT)) == TEXT


@pytest.mark.parametrize(
    ("settings_text", "message"),
    [
        ("[", "not settings of a rank file"),
        ('{"colour": 1}', "not settings of a rank file"),
        ('{"vocab_size": "9"}', "not settings of a rank file"),
        ('{"special_tokens": {"<|endoftext|>": 5}}', "do not fit"),
        ('{"special_tokens": {"a": 260, "b": 260}}', "do not fit"),
        ('{"vocab_size": 100}', "do not fit"),
        ('{"special_tokens": {"": 260, "<|endoftext|>": 261}}', "a special token is empty"),
        ('{"pattern": "("}', "not a rank file with its settings"),
        ('{"pattern": ""}', "it matches the empty text"),
        ('{"pattern": "x*"}', "it matches the empty text"),
        ('{"special_tokens": {"<|endoftext|>": 18446744073709551616}}', "at most 16,777,216 ids"),
    ],
)
def test_wrong_settings_of_a_rank_file(settings_text: str, message: str, tmp_path: Path) -> None:
    path = _rank_file(tmp_path / "small.tiktoken")
    (tmp_path / "small.tiktoken.json").write_text(settings_text)
    with pytest.raises(DataError, match=message):
        build_tokenizer("TiktokenTokenizer", path)


def test_damaged_rank_files(tmp_path: Path) -> None:
    path = _rank_file(tmp_path / "small.tiktoken")
    lines = path.read_text().splitlines()
    for content, message in (
        (lines[:200], "incomplete"),
        (lines[:100] + lines[101:], "incomplete"),
        ([*lines, lines[-1]], "token and its rank|incomplete"),
        ([*lines[:-1], "!!! 259"], "token and its rank"),
        ([*lines, "YWJj"], "token and its rank"),
        ([], "incomplete"),
    ):
        path.write_text("\n".join(content))
        if content == [*lines, lines[-1]]:
            assert build_tokenizer("TiktokenTokenizer", path).vocab_size == 261  # the same line twice says nothing new
            continue
        with pytest.raises(DataError, match=message):
            build_tokenizer("TiktokenTokenizer", path)


@pytest.mark.parametrize("kind", ["bpe", "spm-bpe", "spm-unigram"])
def test_training_is_repeatable_and_lossless(kind: str, golden: Path, tmp_path: Path) -> None:
    texts = [json.loads(line).get("text") for line in (golden / "corpus/part1.jsonl").read_text().splitlines()]
    texts = [text for text in texts if isinstance(text, str)]
    for name in ("one", "two"):
        train_to_file(texts, kind, 400, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    tokenizer = build_tokenizer("HFTokenizer" if kind == "bpe" else "SPMTokenizer", tmp_path / "one")
    assert tokenizer.vocab_size <= 400 and tokenizer.pad != tokenizer.eod
    text = "Turaka  ne 12345 漢字 naïve\n\tend"
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


def test_training_refusals(tmp_path: Path) -> None:
    for kind, size, message in (("bpe", 200, "too small"), ("spm-bpe", 100, "could be trained"), ("words", 300, "unknown")):
        with pytest.raises(DataError, match=message):
            train_to_file(["some text, and some more"], kind, size, tmp_path / "x")


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
