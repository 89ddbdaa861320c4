"""WikiText-103 and enwik8 from a local copy: documents, tokens, splits, receipts, mistakes. No network is used."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from megatron.data import wikitext
from megatron.data.corpora import prepare
from megatron.data.corpus_request import CorpusRequest
from megatron.data.indexed import IndexedDataset
from megatron.data.tokenizers import build_tokenizer
from megatron.errors import DataError
from tests.data.hf_files import around, write

TRAIN = " \n = First Article = \n \n The cat sat . \n = = Part = = \n the cat \n \n = Second = \n A cat\n"
TEST = " = Third = \n cat dog \n"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "wikitext-103-v1.zip"
    with zipfile.ZipFile(path, "w") as out:
        for name, text in (("train", TRAIN), ("valid", TEST), ("test", TEST)):
            out.writestr(f"wikitext-103/wiki.{name}.tokens", text)
    return path


def test_words_lines_and_articles(archive: Path, tmp_path: Path) -> None:
    done = prepare("wikitext103", CorpusRequest(tmp_path / "data", source=archive))
    assert done.created and done.vocab_file is not None
    tokenizer = build_tokenizer(done.tokenizer_type, done.vocab_file, None)
    train = IndexedDataset(done.data_path / "train_text_document")
    assert len(train) == 2, "two articles; the blank line before the first heading belongs to the first"
    tokens = np.concatenate([train.get(i) for i in range(2)]).tolist()
    # every word and one end per line: nothing of the file is lost
    assert len(tokens) == len(TRAIN.split()) + TRAIN.count("\n")
    assert tokens.count(tokenizer.eod) == TRAIN.count("\n")
    assert tokens[0] == tokenizer.eod and tokens[-1] == tokenizer.eod
    assert tokenizer.tokenize(" = First Article = \n") == tokens[1:5]
    words = sorted(set(TRAIN.split()))
    assert tokenizer.vocab_size == len(words) + 2
    test = IndexedDataset(done.data_path / "test_text_document").get(0).tolist()
    unknown = tokenizer.tokenize("dog")
    assert unknown == [1] and test[-2] == 1 and test[-1] == tokenizer.eod


def test_splits_in_yaml_and_a_second_run(archive: Path, tmp_path: Path) -> None:
    request = CorpusRequest(tmp_path / "data", source=archive)
    lines = prepare("wikitext103", request).yaml_lines()
    assert 'valid_data_paths: ["' in lines and "tokenizer.json" in lines and "data_path:" not in lines
    again = prepare("wikitext103", request)
    assert not again.created and again.receipt["documents"] == 4
    (again.data_path / "test_text_document.bin").write_bytes(b"damaged")
    assert prepare("wikitext103", request).created


def test_another_tokenizer(archive: Path, tmp_path: Path) -> None:
    done = prepare("wikitext103", CorpusRequest(tmp_path / "data", "CharLevelTokenizer", source=archive))
    first = IndexedDataset(done.data_path / "train_text_document").get(0)
    assert bytes(first[:-1].tolist()).decode() == TRAIN[: TRAIN.index(" = Second")] and first[-1] == 0


def test_lines_are_no_documents(archive: Path, tmp_path: Path) -> None:
    """A tokenizer that starts and ends texts does neither at every line."""
    found = []
    for name, change in (("plain", None), ("template", around("<s>", "</s>"))):
        vocab_file = str(write(tmp_path / f"{name}.json", change))
        done = prepare("wikitext103", CorpusRequest(tmp_path / name, "HFTokenizer", vocab_file, source=archive))
        found.append(IndexedDataset(done.data_path / "train_text_document").get(0).tolist())
    assert found[0] == found[1] and max(found[0]) < 270


def test_an_unpacked_folder(archive: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(archive).extractall(tmp_path / "unpacked")
    assert prepare("wikitext103", CorpusRequest(tmp_path / "data", source=tmp_path / "unpacked")).created


def test_enwik8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wikitext, "ENWIK8_BYTES", (90, 5, 5))
    data = bytes(range(100))
    (tmp_path / "enwik8").write_bytes(data)
    done = prepare("enwik8", CorpusRequest(tmp_path / "data", source=tmp_path / "enwik8"))
    parts = [IndexedDataset(done.data_path / f"{n}_text_document").get(0).tolist() for n in ("train", "valid", "test")]
    assert [len(p) for p in parts] == [90, 5, 5] and bytes(parts[0] + parts[1] + parts[2]) == data
    assert done.yaml_lines().endswith('tokenizer_type: "CharLevelTokenizer"')
    (tmp_path / "enwik8").write_bytes(data[:50])
    with pytest.raises(DataError, match="not enwik8"):
        prepare("enwik8", CorpusRequest(tmp_path / "other", source=tmp_path / "enwik8"))


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="nothing in it is called wiki.train.tokens"):
        prepare("wikitext103", CorpusRequest(tmp_path / "data", source=tmp_path / "x.zip"))
    monkeypatch.setattr(wikitext, "WIKITEXT_URL", (tmp_path / "absent.zip").as_uri())
    with pytest.raises(DataError, match="--from PATH"):
        prepare("wikitext103", CorpusRequest(tmp_path / "data"))


def test_an_archive_that_is_too_large_or_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.zip"
    for content, says in ((b"x" * 101, "more than 1 GiB"), (b"a \xff b\n", "not UTF-8")):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
            for split in ("train", "valid", "test"):
                out.writestr(f"wikitext-103/wiki.{split}.tokens", content)
        monkeypatch.setattr(wikitext, "_LARGEST", 100)
        with pytest.raises(DataError, match=says):
            list(wikitext._lines(path, "train"))
