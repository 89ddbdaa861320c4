"""Text to token files: NeoX's bytes from NeoX's corpus, any number of workers, and bad text named by file and line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.commands import run_here

from megatron.data.encode import EncodeJob, EncodeOptions, encode_corpus
from megatron.data.indexed import IndexedDataset
from megatron.data.rows import Row, row_texts
from megatron.data.tokenizers import HFTokenizer
from megatron.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[2]
CHARS = EncodeJob("CharLevelTokenizer")
HF = ("HFTokenizer", "bpe_tokenizer.json", None)
RUNS = {
    "hf_eod": (HF, ["corpus"], True),
    "hf_noeod": (HF, ["corpus"], False),
    "spm_eod": (("SPMTokenizer", "spm_eod.model", None), ["corpus"], True),
    "spm_plain_eod": (("SPMTokenizer", "spm_plain.model", None), ["corpus"], True),
    "char_eod": (("CharLevelTokenizer", None, None), ["corpus"], True),
    "gpt2_eod": (("GPT2BPETokenizer", "gpt2_vocab.json", "gpt2_merges.txt"), ["corpus"], True),
    "part0": (HF, ["part0"], True),
    "part1": (HF, ["part1"], True),
    "part2": (HF, ["part2"], True),
    "multi_input": (HF, ["part2", "part0", "part1"], True),
    "whitespace_hf": (HF, ["whitespace_doc"], True),
    "whitespace_spm_noeod": (("SPMTokenizer", "spm_eod.model", None), ["whitespace_doc"], False),
}


def _golden_job(golden: Path, tokenizer: Sequence[str | None], append_eod: bool, ftfy: bool = False) -> EncodeJob:
    vocab_file, merge_file = (None if name is None else str(golden / "tokenizers" / name) for name in tokenizer[1:])
    return EncodeJob(str(tokenizer[0]), vocab_file, merge_file, append_eod=append_eod, ftfy=ftfy)


def _assert_equal(made: Path, golden: Path, name: str) -> None:
    for suffix in (".bin", ".idx"):
        expected = (golden / "preprocess" / f"{name}_text_document{suffix}").read_bytes()
        assert Path(f"{made}_text_document{suffix}").read_bytes() == expected, name + suffix


@pytest.mark.parametrize("name", RUNS)
def test_bytes_of_neox(name: str, golden: Path, tmp_path: Path) -> None:
    tokenizer, parts, append_eod = RUNS[name]
    inputs = [str(golden / "corpus" / f"{part}.jsonl") for part in parts]
    encode_corpus(_golden_job(golden, tokenizer, append_eod), inputs, str(tmp_path / name))
    _assert_equal(tmp_path / name, golden, name)


def test_bytes_of_neox_in_int32(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HFTokenizer, "vocab_size", 70000)
    encode_corpus(_golden_job(golden, HF, True), [str(golden / "corpus/corpus.jsonl")], str(tmp_path / "x"))
    _assert_equal(tmp_path / "x", golden, "hf_eod_i32")


def test_legacy_format_of_neox(golden: Path, tmp_path: Path) -> None:
    job = replace(_golden_job(golden, HF, True), cached=True)
    encode_corpus(job, [str(golden / "corpus/corpus.jsonl")], str(tmp_path / "x"))
    _assert_equal(tmp_path / "x", golden, "hf_eod_cached")


def test_two_keys(golden: Path, tmp_path: Path) -> None:
    """NeoX gives every key the tokens of `text`; here `meta` is really read, and is an object where it exists."""
    rows = [json.loads(line) for line in (golden / "corpus/part0.jsonl").read_text().splitlines()]
    source = _write(tmp_path / "a.jsonl", [{"text": row.get("text", ""), "meta": str(row.get("meta"))} for row in rows])
    encode_corpus(replace(_golden_job(golden, HF, True), keys=("text", "meta")), [source], str(tmp_path / "x"))
    _assert_equal(tmp_path / "x", golden, "two_keys")
    assert IndexedDataset(tmp_path / "x_meta_document").total_tokens > 0


def test_blank_documents(golden: Path, tmp_path: Path) -> None:
    """NeoX crashes on a text without a token with --append-eod; here it is a boundary without a sequence, as without the flag."""
    job = _golden_job(golden, ("SPMTokenizer", "spm_eod.model", None), True)
    encode_corpus(job, [str(golden / "corpus/whitespace_doc.jsonl")], str(tmp_path / "x"))
    made = IndexedDataset(tmp_path / "x_text_document")
    assert len(made) == 2 and made.doc_idx.tolist() == [0, 1, 1, 2]


def test_ftfy(golden: Path, tmp_path: Path) -> None:
    job, inputs = _golden_job(golden, HF, True, ftfy=True), [str(golden / "corpus/corpus.jsonl")]
    if find_spec("ftfy") is None:
        with pytest.raises(DataError, match="ftfy"):
            encode_corpus(job, inputs, str(tmp_path / "x"))
    else:
        encode_corpus(job, inputs, str(tmp_path / "x"))
        _assert_equal(tmp_path / "x", golden, "hf_eod_ftfy")


def test_two_workers_give_the_same_bytes(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.data.encoder._BATCH_ROWS", 4)
    inputs = [str(golden / "corpus/corpus.jsonl")]
    done = encode_corpus(_golden_job(golden, HF, True), inputs, str(tmp_path / "x"), EncodeOptions(workers=2))
    _assert_equal(tmp_path / "x", golden, "hf_eod")
    assert done.documents == 60 and done.empty == 2


def _write(path: Path, rows: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _documents(prefix: Path) -> list[bytes]:
    dataset = IndexedDataset(prefix)
    return [dataset.get(i).astype("u1").tobytes() for i in range(len(dataset))]


def test_the_named_keys_are_read(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.jsonl", [{"text": "one", "title": "A"}, {"text": "two", "title": ["B", "C"]}])
    done = encode_corpus(EncodeJob("CharLevelTokenizer", keys=("title", "text")), [source], str(tmp_path / "o"))
    assert _documents(tmp_path / "o_title_document") == [b"A", b"B\n\nC"]
    assert _documents(tmp_path / "o_text_document") == [b"one", b"two"]
    assert done.tokens == {"title_document": 5, "text_document": 6}


def test_folders_text_files_and_plain_strings(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "deeper").mkdir(parents=True)
    (folder / "b.txt").write_bytes("one\r\ndocument é".encode())
    (folder / "deeper" / "c.jsonl").write_bytes(b'\xef\xbb\xbf"first"\n\n{"text": ""}\n{"text": "last"}')
    (folder / "ignored.md").write_text("no")
    encode_corpus(EncodeJob("CharLevelTokenizer", append_eod=True), [str(folder)], str(tmp_path / "new" / "o"))
    expected = ["one\r\ndocument é\x00".encode(), b"first\x00", b"last\x00"]
    assert _documents(tmp_path / "new" / "o_text_document") == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        (b'{"text": ', "not JSON"),
        (b'{"body": "x"}', "no field 'text'"),
        (b'{"text": 5}', "not text"),
        (b'{"text": ["a", null]}', "not text"),
        (b"[1]", "not a record"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b"[" * 100_000, "not JSON"),
    ],
)
@pytest.mark.parametrize("workers", [1])
def test_a_bad_row_is_named_and_nothing_is_left(line: bytes, message: str, workers: int, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=message) as error:
        encode_corpus(CHARS, [str(source)], str(tmp_path / "o"), EncodeOptions(workers))
    assert error.value.where == f"{source}:3"
    assert list(tmp_path.iterdir()) == [source]


def test_a_bad_row_in_a_worker_arrives_whole(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b'{"text": "good"}\n{"text": \n')
    with pytest.raises(DataError, match="not JSON") as error:
        encode_corpus(CHARS, [str(source)], str(tmp_path / "o"), EncodeOptions(workers=2))
    assert error.value.where == f"{source}:2" and error.value.hint
    assert list(tmp_path.iterdir()) == [source]


def test_nothing_to_encode(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    blank = _write(tmp_path / "blank.jsonl", [{"text": ""}, {"text": []}])
    (tmp_path / "folder").mkdir()
    (tmp_path / "x.md").write_bytes(b"x")
    for source, message in (
        (str(empty), "corpus is empty"),
        (blank, "corpus is empty"),
        (str(tmp_path / "absent"), "does not exist"),
        (str(tmp_path / "folder"), "holds no text"),
        (str(tmp_path / "x.md"), "not read"),
    ):
        with pytest.raises(DataError, match=message):
            encode_corpus(CHARS, [source], str(tmp_path / "o"))
    assert not list(tmp_path.glob("*o_text*"))


def test_a_text_file_has_one_key() -> None:
    with pytest.raises(DataError, match="'title'"):
        row_texts(Row("a.txt", b"x", is_json=False), ["title"])


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_here("tools/datasets/preprocess_data.py", *arguments)


def test_command(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    common = ["--input", source, "--tokenizer-type", "CharLevelTokenizer", "--output-prefix", str(tmp_path / "o")]
    done = _command(*common, "--append-eod", "--jsonl-keys", "text", "--log-interval", "1", "--num-docs", "2")
    assert done.returncode == 0, done.stderr
    assert "8 tokens" in done.stdout and "2 documents" in done.stderr
    assert _documents(tmp_path / "o_text_document") == [b"one\x00", b"two\x00"]
    refused = _command(*common, "--workers", "0")
    assert refused.returncode == 3 and "--workers" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_documents_without_the_marker_are_counted(workers: int, tmp_path: Path) -> None:
    """Empty rows and set-aside rows are not among them; the label of such a document is the document."""
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "ab#cd"}\n{"text": ""}\n{"text": "abcd"}\n{"text": "#"}\n{"text": \n{"text": "x"}\n')
    words = ("--input", source, "--tokenizer-type", "CharLevelTokenizer", "--output-prefix", tmp_path / "x")
    words += ("--workers", str(workers), "--bad-row-limit", "1")
    script = "tools/datasets/preprocess_data_with_mask.py"
    done = run_here(script, *words, "--mask-before-token", str(ord("#")))
    assert done.returncode == 0, done.stderr
    line = f"warning: 2 of 6 documents do not contain the marker, the first is {source}:3: all their tokens count in the loss\n"
    assert line in done.stdout
    labels = [label.tolist() for label in map(IndexedDataset(tmp_path / "x_label_document").get, range(4))]
    assert labels == [[-100] * 3 + [*b"cd"], [*b"abcd"], [-100], [*b"x"]]
    every = run_here(
        script, *words, "--mask-before-token", str(ord("x")), "--input", _write(tmp_path / "b.jsonl", [{"text": "x"}])
    )
    assert every.returncode == 0 and "warning" not in every.stdout


def test_a_marker_that_occurs_nowhere_is_refused(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.jsonl", [{"text": "ab"}, {"text": ""}, {"text": "cd"}])
    words = ("--input", source, "--tokenizer-type", "CharLevelTokenizer", "--output-prefix", tmp_path / "out" / "x")
    done = run_here("tools/datasets/preprocess_data_with_mask.py", *words, "--mask-before-token", "99,97")
    assert done.returncode == 3 and "no document contains the marker 99,97" in done.stderr, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.glob("out/x*"))
