"""Small files that would become huge ones, or steps without end: named at once, and little is held."""

from __future__ import annotations

import gzip
import json
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from tokenizers import Tokenizer as Backend

from megatron.data import readers
from megatron.data.order_cache import cached_sample_index
from megatron.data.readers import RowReader
from megatron.data.tokenizers import build_tokenizer
from megatron.errors import DataError
from tests.data.hf_files import write

ZEROS = bytes(1 << 20)


def gzip_bomb(path: Path) -> None:
    with gzip.open(path, "wb", compresslevel=1) as handle:
        for _ in range(96):
            handle.write(ZEROS)


def zstd_bomb(path: Path) -> None:
    with zstandard.open(path, "wb") as handle:
        for _ in range(512):
            handle.write(ZEROS)


@pytest.fixture
def little() -> Iterator[None]:
    """Less than 512 MiB more and five seconds."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 << 10
    assert time.process_time() - start < 5


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.jsonl.zst", "a.txt.zst"])
def test_files_that_grow_without_end(name: str, tmp_path: Path, little: None) -> None:
    make: Callable[[Path], None] = gzip_bomb if name.endswith(".gz") else zstd_bomb
    make(tmp_path / name)
    with pytest.raises(DataError, match="expands too much") as caught:
        list(RowReader([str(tmp_path / name)]))
    assert caught.value.where == str(tmp_path / name) and "more than 200 times" in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl"])
def test_text_that_repeats_itself_is_no_bomb(name: str, tmp_path: Path) -> None:
    """A log grows fifty times; all of it is read, by the byte."""
    lines = b"".join(b'{"text": "GET /index.html 200 %d"}\n' % i for i in range(20_000))
    data = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)(lines)
    (tmp_path / name).write_bytes(data)
    rows = list(RowReader([str(tmp_path / name)]))
    assert b"\n".join(row.data.strip() for row in rows) + b"\n" == lines
    assert rows[-1].position.offset == len(lines)


def test_frames_behind_each_other_and_a_cut_end(tmp_path: Path) -> None:
    """Frames shorter and longer than what is handed on at once."""
    rng = np.random.default_rng(1)
    texts = [json.dumps({"text": rng.bytes(size).hex()}).encode() + b"\n" for size in (1, 900, 40_000, 3)]
    data = b"".join(map(zstandard.compress, texts))
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    assert [row.data for row in RowReader([str(tmp_path / "a.jsonl.zst")])] == texts
    (tmp_path / "a.jsonl.zst").write_bytes(data[:-4])
    with pytest.raises(DataError, match="cut"):
        list(RowReader([str(tmp_path / "a.jsonl.zst")]))


@pytest.mark.parametrize(("name", "what"), [("a.jsonl", "line is too long"), ("a.txt", "text is too long")])
def test_one_document_has_an_end(name: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_LONGEST_ROW", 1000)
    monkeypatch.setattr(readers, "_LONGEST_TEXT", 1000)
    (tmp_path / name).write_bytes(b"x" * 1000)
    with pytest.raises(DataError, match=what):
        list(RowReader([str(tmp_path / name)]))


def test_more_passes_than_anybody_wants(tmp_path: Path, little: None) -> None:
    sizes = np.full(50, 100, dtype=np.int32)
    with pytest.raises(DataError, match="4,000,000,000 samples of a corpus this small") as caught:
        cached_sample_index(tmp_path / "c", "train", range(50), sizes, 64, 4_000_000_000, seed=1)
    assert "train_iters" in str(caught.value)
    assert len(cached_sample_index(tmp_path / "c", "train", range(50), sizes, 64, 100_000, seed=1)) >= 100_000


def test_padding_and_truncation_of_a_tokenizer(tmp_path: Path, little: None) -> None:
    """What its last user asked for is not done: a billion padding tokens are 20 GB."""

    def ask(made: Backend) -> None:
        made.enable_padding(length=1_000_000_000)
        made.enable_truncation(1_000_000_000, stride=999_999_999)

    tokenizer = build_tokenizer("HFTokenizer", write(tmp_path / "tokenizer.json", ask))
    assert len(tokenizer.tokenize("the cat")) <= 7 and len(tokenizer.tokenize_batch(["the cat"])[0]) <= 7


def test_an_id_that_no_embedding_has_a_row_for(tmp_path: Path, little: None) -> None:
    def far(content: dict[str, Any]) -> None:
        content["model"]["vocab"]["far"] = 1_000_000_000

    with pytest.raises(DataError, match="a token has the id 1000000000"):
        build_tokenizer("HFTokenizer", write(tmp_path / "tokenizer.json", edit=far))
