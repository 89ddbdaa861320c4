"""Built-in corpora: the same bytes each time, nothing done twice, and damage made good."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.commands import run_here

from megatron.data import corpora
from megatron.data.corpora import CorpusRequest, PreparedCorpus, prepare, python_sources
from megatron.data.indexed import IndexedDataset
from megatron.data.tokenizers import build_tokenizer
from megatron.data.train_tokenizer import train_byte_level_bpe
from megatron.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small stand-in for the standard library, with all that must be left out."""
    root = tmp_path / "lib"
    files = {
        "b.py": "import os\n\n\ndef second() -> None:\n    print(os.name)\n" * 20,
        "a/z.py": "class First:\n    value = 'naïve'\n" * 20,
        "a/__init__.py": "",
        "a/tests/t.py": "x = 1\n",
        "test/t.py": "x = 1\n",
        "site-packages/p.py": "x = 1\n",
        "__pycache__/c.py": "x = 1\n",
        "notes.txt": "no",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    (root / "a/latin.py").write_bytes(b"# -*- coding: latin-1 -*-\r\nname = 'caf\xe9'\r\n")
    (root / "a/broken.py").write_bytes(b"name = 'caf\xe9'\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))
    monkeypatch.setattr(corpora, "PYSTDLIB_VOCABULARY", 300)
    return root


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "receipt.json"}


def test_pystdlib(sources: Path, tmp_path: Path) -> None:
    done = prepare("pystdlib", CorpusRequest(tmp_path / "one"))
    assert [str(path.relative_to(sources)) for path in python_sources(sources)] == [
        "b.py", "a/__init__.py", "a/broken.py", "a/latin.py", "a/z.py",
    ]  # fmt: skip
    assert done.made and done.receipt["documents"] == 3 and done.receipt["undecodable_files"] == 1
    tokenizer = build_tokenizer(done.tokenizer_type, done.vocab_file)
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (300, 0, 1)
    dataset = IndexedDataset(done.data_path)
    dataset.check_vocabulary(tokenizer.vocab_size)
    assert dataset.total_tokens == done.receipt["tokens"]
    texts = [tokenizer.detokenize(dataset.get(i).tolist()) for i in range(len(dataset))]
    assert texts[0] == (sources / "b.py").read_text() + "<|endoftext|>"
    assert texts[1] == "# -*- coding: latin-1 -*-\nname = 'café'\n<|endoftext|>"
    assert f'data_path: "{done.data_path}"' in done.yaml_lines() and "merge_file" not in done.yaml_lines()


def test_two_runs_are_equal_and_a_third_does_nothing(sources: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert prepare("pystdlib", CorpusRequest(tmp_path / name)).made
    assert _files(tmp_path / "one/pystdlib") == _files(tmp_path / "two/pystdlib")
    assert not prepare("pystdlib", CorpusRequest(tmp_path / "one")).made
    assert prepare("pystdlib", CorpusRequest(tmp_path / "one", force=True)).made


@pytest.mark.parametrize("name", ["pystdlib_text_document.bin", "pystdlib_text_document.idx", "tokenizer.json", "receipt.json"])
def test_damage_is_made_good(name: str, sources: Path, tmp_path: Path) -> None:
    folder = tmp_path / "one" / "pystdlib"
    prepare("pystdlib", CorpusRequest(tmp_path / "one"))
    before = _files(folder)
    for content in (None, b"", b"{}", (folder / name).read_bytes()[:-3]):
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        assert prepare("pystdlib", CorpusRequest(tmp_path / "one")).made
        assert _files(folder) == before


def test_another_tokenizer(sources: Path, tmp_path: Path) -> None:
    request = CorpusRequest(tmp_path, "CharLevelTokenizer")
    done = prepare("pystdlib", request)
    assert done.vocab_file is None and done.receipt["vocab_size"] == 512
    assert IndexedDataset(done.data_path).get(0).astype("u1").tobytes() == (sources / "b.py").read_bytes() + b"\x00"
    assert not prepare("pystdlib", request).made
    assert prepare("pystdlib", CorpusRequest(tmp_path)).made  # the files there are of another tokenizer
    with pytest.raises(DataError, match="vocab_file"):
        prepare("pystdlib", CorpusRequest(tmp_path / "new", "SPMTokenizer"))
    assert not (tmp_path / "new").exists()


def test_names(tmp_path: Path) -> None:
    with pytest.raises(DataError) as near:
        prepare("pystdlb", CorpusRequest(tmp_path))
    assert "pystdlib" in str(near.value.why)
    with pytest.raises(DataError, match="not built in"):
        prepare("enron", CorpusRequest(tmp_path))


def test_no_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "absent"))
    with pytest.raises(DataError, match="no Python sources"):
        prepare("pystdlib", CorpusRequest(tmp_path))


def test_trained_tokenizer_is_lossless_on_other_text(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(train_byte_level_bpe(["some training text, some more"] * 9, 280))
    tokenizer = build_tokenizer("HFTokenizer", tmp_path / "t.json")
    text = "naïve\t漢字\r\n  \x00 end"
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_here("prepare_data.py", *arguments)


def test_without_a_name_the_command_says_what_it_makes_and_what_else_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import prepare_data

    def made(name: str, request: CorpusRequest) -> PreparedCorpus:
        receipt = {"seconds": 1, "documents": 1, "bytes": 1, "tokens": 1, "vocab_size": 1, "undecodable_files": 0}
        return PreparedCorpus(request.data_dir / name / "x", "HFTokenizer", None, None, receipt, True)

    monkeypatch.setattr(prepare_data, "prepare", made)
    prepare_data.main(["-d", str(tmp_path)])  # as GPT-NeoX's README types it
    said = capsys.readouterr().out
    assert "no dataset was named, so pystdlib is made" in said and f"made {tmp_path}/pystdlib" in said
    assert "enwik8, wikitext103" in said or "wikitext103, enwik8" in said
    neox = {"enron", "pile_subset", "pile", "github", "arxiv", "europarl", "freelaw", "nih", "pubmed", "books1", "books3"}
    neox |= {"hackernews", "openwebtext2", "stackexchange", "ubuntu_irc", "youtube_subtitles", "c4", "c4_openwebtext"}
    assert all(f"{name}," in said or f"{name}\n" in said for name in neox)
    prepare_data.main(["enwik8", "-d", str(tmp_path)])
    said = capsys.readouterr().out
    assert "no dataset was named" not in said and f"made {tmp_path}/enwik8" in said


def test_command_refuses_clearly(tmp_path: Path) -> None:
    done = _command("pystdlb", "--data-dir", str(tmp_path))
    assert done.returncode == 3 and "nearest: pystdlib" in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "file").write_text("")
    done = _command("pystdlib", "-d", str(tmp_path / "file"), "-t", "CharLevelTokenizer")
    assert done.returncode == 3 and "cannot be written" in done.stderr


@pytest.mark.slow
def test_the_real_standard_library(tmp_path: Path) -> None:
    done = _command("pystdlib", "-d", str(tmp_path))
    assert done.returncode == 0, done.stderr
    dataset = IndexedDataset(tmp_path / "pystdlib/pystdlib_text_document")
    dataset.check_vocabulary(4096)
    assert dataset.total_tokens > 2_000_000 and len(dataset) > 500
    again = _command("pystdlib", "-d", str(tmp_path))
    assert "nothing to do" in again.stdout
