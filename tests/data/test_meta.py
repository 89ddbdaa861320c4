"""What is known about a corpus beside its tokens: the tokenizer that made it, its merge with others, and tools/data.py."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests.commands import run_here

from megatron.data.encode import EncodeJob, encode_corpus
from megatron.data.fingerprint import check_fingerprint, check_identity, data_identity, read_meta
from megatron.data.indexed import IndexedDataset, IndexedWriter
from megatron.data.merge import merge_corpora, prefixes_in
from megatron.data.order import build_sample_index, split_documents
from megatron.data.token_format import meta_file
from megatron.data.tokenizers import CharLevelTokenizer, build_tokenizer
from megatron.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def made(golden: Path, tmp_path: Path) -> str:
    """A corpus of the golden text by the golden BPE."""
    job = EncodeJob("HFTokenizer", str(golden / "tokenizers/bpe_tokenizer.json"), append_eod=True)
    encode_corpus(job, [str(golden / "corpus/part0.jsonl")], str(tmp_path / "made"))
    return str(tmp_path / "made_text_document")


def test_fingerprint_of_a_corpus(made: str, golden: Path, corpus: str, caplog: pytest.LogCaptureFixture) -> None:
    right = build_tokenizer("HFTokenizer", golden / "tokenizers/bpe_tokenizer.json")
    wrong = build_tokenizer("SPMTokenizer", golden / "tokenizers/spm_eod.model")
    assert check_fingerprint(made, right)
    with pytest.raises(DataError, match="another tokenizer") as error:
        check_fingerprint(made, wrong)
    assert "bpe_tokenizer.json, 600 entries" in str(error.value.why) and "SPMTokenizer" in str(error.value.why)
    with caplog.at_level(logging.WARNING):
        assert not check_fingerprint(corpus, right)
    assert "no record" in caplog.text
    shutil.copyfile(meta_file(made), meta_file(corpus))  # speaks of files of other lengths
    assert not check_fingerprint(corpus, wrong)
    meta_file(made).write_text('{"format": 1}')
    with pytest.raises(DataError, match="record of a corpus is damaged"):
        check_fingerprint(made, right)


def test_resume_checks_tokenizer_and_data(made: str, corpus: str, golden: Path) -> None:
    right = build_tokenizer("HFTokenizer", golden / "tokenizers/bpe_tokenizer.json")
    saved = json.loads(json.dumps(data_identity([made, corpus], right)))
    check_identity(saved, data_identity([made, corpus], right))
    for paths, tokenizer, message in (
        ([made, corpus], CharLevelTokenizer(), "another tokenizer"),
        ([made, made], right, "training corpus 1"),
        ([made], right, "training corpus 1"),
        ([made, corpus, corpus], right, "training corpus 2"),
    ):
        with pytest.raises(DataError, match=message):
            check_identity(saved, data_identity(paths, tokenizer))


def test_merge_has_the_right_borders(golden: Path, tmp_path: Path) -> None:
    parts = [str(golden / f"preprocess/part{i}_text_document") for i in range(3)]
    merged = merge_corpora([*parts, str(golden / "writer/merged")], str(tmp_path / "all"))
    opened = [IndexedDataset(part) for part in parts]
    theirs = IndexedDataset(golden / "writer/merged")
    assert theirs.doc_idx.tolist() == [0]  # what NeoX's merge leaves; ours counts on
    sequences = [part.get(i).tolist() for part in (*opened, theirs) for i in range(len(part))]
    assert [merged.get(i).tolist() for i in range(len(merged))] == sequences
    assert merged.doc_idx.tolist() == list(range(len(sequences) + 1))
    two = merge_corpora(parts[:2], str(tmp_path / "two"))
    assert two.doc_idx.tolist() == [*opened[0].doc_idx, *(opened[1].doc_idx[1:] + len(opened[0]))]


def test_merge_of_types_and_refusals(made: str, corpus: str, golden: Path, tmp_path: Path) -> None:
    wide = merge_corpora([corpus, str(golden / "preprocess/hf_eod_i32_text_document")], str(tmp_path / "wide"))
    assert wide.dtype == np.int32 and read_meta(tmp_path / "wide") is None
    assert read_meta(merge_corpora([made, made], str(tmp_path / "same")).prefix) is not None
    assert [Path(name).name for name in prefixes_in(tmp_path)] == ["corpus", "made_text_document", "same", "wide"]
    encode_corpus(EncodeJob("CharLevelTokenizer"), [str(golden / "corpus/part0.jsonl")], str(tmp_path / "c"))
    with IndexedWriter(tmp_path / "f", "float32") as writer:
        writer.add_document(np.ones(3, np.float32))
    for names, message in (
        ([], "nothing to merge"),
        ([corpus, made, str(tmp_path / "c_text_document")], "different tokenizers"),
        ([str(tmp_path / "f")], "no tokens"),
    ):
        with pytest.raises(DataError, match=message):
            merge_corpora(names, str(tmp_path / "o"))
    with pytest.raises(DataError, match="into itself"):
        merge_corpora([corpus], corpus)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="no corpus"):
        prefixes_in(tmp_path / "folder")


def _tool(*arguments: object, script: str = "tools/data.py") -> subprocess.CompletedProcess[str]:
    return run_here(script, *arguments)


def test_samples_command(golden: Path, tmp_path: Path) -> None:
    source = golden / "preprocess/hf_eod_text_document"
    done = _tool(
        "samples", "--data-path", source, "--split", "8,1,1", "--name", "valid", "--seq-length", 24, "--num-samples", 30,
        "--seed", 99, "--output", tmp_path / "x.npz",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    corpus = IndexedDataset(source)
    order = build_sample_index(split_documents("8,1,1", len(corpus))["valid"], corpus.sizes, 24, 30, 99)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as arrays:
        assert all(np.array_equal(arrays[name], getattr(order, name)) for name in ("doc_idx", "sample_idx", "shuffle_idx"))
        assert arrays["tokens"].shape == (len(order), 25)


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_inspect_verify_merge_count(made: str, corpus: str, golden: Path, tmp_path: Path) -> None:
    picture = tmp_path / "lengths.png"
    done = _tool(
        "inspect", "--data-path", made, "--histogram", picture, "--samples", 2, "--tokenizer-type", "HFTokenizer",
        "--vocab-file", golden / "tokenizers/bpe_tokenizer.json",
    )  # fmt: skip
    assert done.returncode == 0 and '"sequences": 10' in done.stdout and "--- sequence 5" in done.stdout, done.stdout
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert '"checksums": "right"' in _tool("verify", "--data-path", made).stdout
    assert "none" in _tool("verify", "--data-path", corpus).stdout
    assert '"right"' in _tool("verify", "--data-path", corpus, "--write-checksums").stdout
    refused = _tool("verify", "--data-path", corpus, "--vocab-size", 50)
    assert refused.returncode == 3 and "outside the vocabulary" in refused.stderr and "Traceback" not in refused.stderr
    assert _tool("merge", "--input", made, corpus, "--output-prefix", tmp_path / "m").returncode == 0
    assert "total" in _tool("count", "--data-path", tmp_path / "m", corpus).stdout


def test_commands_of_the_datasets_folder(golden: Path, tmp_path: Path) -> None:
    text = golden / "corpus/part1.jsonl"
    for kind, name, type_name in (("bpe", "t.json", "HFTokenizer"), ("spm-bpe", "t.model", "SPMTokenizer")):
        script, output = "tools/datasets/train_tokenizer.py", tmp_path / name
        done = _tool("--input", text, "--kind", kind, "--vocab-size", 400, "--output", output, script=script)
        assert done.returncode == 0 and type_name in done.stdout, done.stderr
        assert build_tokenizer(type_name, output).vocab_size <= 400
    done = _tool(
        "--input", text, "--tokenizer-type", "HFTokenizer", "--vocab-file", golden / "tokenizers/bpe_tokenizer.json",
        "--output-prefix", tmp_path / "m/masked", "--append-eod", "--mask-before-token", "15",
        script="tools/datasets/preprocess_data_with_mask.py",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in ("text_document.bin", "text_document.idx", "label_document.bin", "label_document.idx"):
        for case in ("masked", "masked_i32"):
            assert (tmp_path / f"m/masked_{name}").read_bytes() == (golden / f"preprocess/{case}_{name}").read_bytes()
    done = _tool("--input", tmp_path / "m", "--output-prefix", tmp_path / "all", script="tools/datasets/merge_datasets.py")
    assert done.returncode == 0 and "2 corpora" in done.stdout, done.stderr
