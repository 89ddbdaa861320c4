"""The tokenizer of an exported folder gives the ids of training, for each kind that can be expressed."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from megatron.data.tokenizers import build_tokenizer
from megatron.export.tokenizer import export_tokenizer

TEXT = "def f(x):\n    return x  # na\u00efve \u4f60\u597d 123\n"


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [(folder / name).read_text("utf-8") for name in ("ast.py", "argparse.py", "bisect.py")]


def byte_pairs(corpus: list[str]) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>", "<|padding|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(corpus, trainer)
    return backend


def check(output: Path, kind: str, *files: Path) -> Any:
    tokenizer = build_tokenizer(kind, *files)
    loaded = AutoTokenizer.from_pretrained(output)
    for text in (TEXT, "  two  spaces ", "one"):
        assert loaded(text)["input_ids"] == tokenizer.tokenize(text)
    assert loaded.eos_token_id == tokenizer.eod
    assert loaded.decode(tokenizer.tokenize(TEXT)) == tokenizer.detokenize(tokenizer.tokenize(TEXT))
    return loaded


def folders(tmp_path: Path) -> tuple[Path, Path]:
    source, output = tmp_path / "tokenizer", tmp_path / "out"
    source.mkdir()
    output.mkdir()
    return source, output


def test_hf_json(tmp_path: Path, corpus: list[str]) -> None:
    source, output = folders(tmp_path)
    byte_pairs(corpus).save(str(source / "my-vocab.json"))
    for facts in ({"type": "HFTokenizer"}, {}):
        notes = export_tokenizer(source, facts, output, 128)
        assert "equal to training" in notes[0]
    loaded = check(output, "HFTokenizer", source / "my-vocab.json")
    assert (loaded.pad_token, loaded.padding_side, loaded.model_max_length) == ("<|padding|>", "left", 128)


def test_gpt2_pair(tmp_path: Path, corpus: list[str]) -> None:
    source, output = folders(tmp_path)
    byte_pairs(corpus).model.save(str(source))
    assert "equal to training" in export_tokenizer(source, {"type": "GPT2BPETokenizer"}, output, None)[0]
    check(output, "GPT2BPETokenizer", source / "vocab.json", source / "merges.txt")


def test_bytes(tmp_path: Path) -> None:
    _, output = folders(tmp_path)
    assert "equal to training" in export_tokenizer(tmp_path / "none", {"type": "CharLevelTokenizer"}, output, None)[0]
    loaded = check(output, "CharLevelTokenizer")
    assert len(loaded) == 512 and loaded.pad_token_id == 1
    assert loaded(["a", "abc"], padding=True)["input_ids"] == [[1, 1, 97], [97, 98, 99]]


def sentencepiece_model(folder: Path, corpus: list[str], kind: str) -> Path:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(corpus).splitlines()),
        model_prefix=str(folder / "m"),
        vocab_size=500,
        model_type=kind,
        user_defined_symbols=["<|endoftext|>"],
        minloglevel=2,
    )
    (folder / "m.vocab").unlink()
    return folder / "m.model"


def test_sentencepiece_unigram(tmp_path: Path, corpus: list[str]) -> None:
    source, output = folders(tmp_path)
    model = sentencepiece_model(source, corpus, "unigram")
    assert "equal to training" in export_tokenizer(source, {"type": "SPMTokenizer"}, output, None)[0]
    tokenizer, loaded = build_tokenizer("SPMTokenizer", model), AutoTokenizer.from_pretrained(output)
    assert loaded(TEXT)["input_ids"] == tokenizer.tokenize(TEXT) and loaded.eos_token_id == tokenizer.eod


def test_what_cannot_be_expressed_is_said_and_not_written(
    tmp_path: Path, corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = folders(tmp_path)
    byte_pairs(corpus).save(str(source / "v.json"))
    other = json.loads((source / "v.json").read_text())
    other["pre_tokenizer"]["add_prefix_space"] = True
    wrong = Backend.from_str(json.dumps(other))
    monkeypatch.setattr("megatron.export.tokenizer.prompt_backend", lambda *_: wrong)
    note = export_tokenizer(source, {"type": "HFTokenizer"}, output, None)[0]
    assert "no exact form" in note and (output / "v.json").is_file() and not (output / "tokenizer.json").exists()


def test_no_tokenizer(tmp_path: Path) -> None:
    assert "none in the checkpoint" in export_tokenizer(tmp_path / "none", {}, tmp_path, None)[0]
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "broken.json").write_text("{")
    (tmp_path / "out").mkdir()
    note = export_tokenizer(tmp_path / "tokenizer", {}, tmp_path / "out", None)[0]
    assert "cannot be written" in note and (tmp_path / "out" / "broken.json").is_file()


def test_a_vocabulary_without_an_end_of_document(tmp_path: Path) -> None:
    source, output = folders(tmp_path)
    Backend(models.BPE({chr(c): c - 32 for c in range(32, 127)}, [])).save(str(source / "v.json"))
    json_text = json.loads((source / "v.json").read_text())
    json_text["model"]["unk_token"] = "?"
    (source / "v.json").write_text(json.dumps(json_text))
    assert "equal to training" in export_tokenizer(source, {"type": "HFTokenizer"}, output, None)[0]
    assert AutoTokenizer.from_pretrained(output).eos_token is None
