"""Every kind of input gives the same tokens; damage is named; reading can go on behind any row."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megatron.data.encode import EncodeJob, EncodeOptions, encode_corpus
from megatron.data.indexed import IndexedDataset
from megatron.data.readers import RowReader, check_sums, expand_inputs
from megatron.data.rows import RowPosition, row_texts
from megatron.errors import DataError

RECORDS = [{"text": f"document {i} é漢\n" * (i % 7), "title": f"t{i}", "n": i} for i in range(700)]
LINES = b"".join(json.dumps(record).encode() + b"\n" * (1 + record["n"] % 3) for record in RECORDS)  # type: ignore[operator]
NEEDS_ARROW = pytest.mark.skipif(find_spec("pyarrow") is None, reason="pyarrow is not installed (extra: datasets)")
NEEDS_DATASETS = pytest.mark.skipif(find_spec("datasets") is None, reason="datasets is not installed (extra: datasets)")


def _parquet(path: Path, records: list[dict[str, Any]] = RECORDS, **options: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(records), path, row_group_size=100, write_page_checksum=True, **options)


def _two_frames(path: Path) -> None:
    packer = zstandard.ZstdCompressor(write_checksum=True)
    path.write_bytes(packer.compress(LINES[:5000]) + packer.compress(LINES[5000:]))


MAKERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(LINES),
    "a.json": lambda path: path.write_bytes(b"\xef\xbb\xbf" + LINES),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "a.gz": lambda path: path.write_bytes(gzip.compress(LINES[:999]) + gzip.compress(LINES[999:])),
    "a.jsonl.zst": _two_frames,
    "a.zst": lambda path: path.write_bytes(zstandard.compress(LINES)),
    "a.parquet": _parquet,
}
KINDS = [pytest.param(name, marks=NEEDS_ARROW) if name == "a.parquet" else name for name in MAKERS]


def _texts(reader: RowReader) -> list[list[str]]:
    return [row_texts(row, ["title", "text"]) for row in reader]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_the_same_rows_from_any_place(name: str, tmp_path: Path) -> None:
    MAKERS[name](tmp_path / name)
    sources = expand_inputs([str(tmp_path)])
    reader = RowReader(sources, ["title", "text"])
    rows = list(reader)
    expected = [[record["title"], record["text"]] for record in RECORDS]
    assert [row_texts(row, ["title", "text"]) for row in rows] == expected
    assert reader.done_bytes == reader.total_bytes == (tmp_path / name).stat().st_size
    places = (0, 99, 345, 699) if name == "a.parquet" else (0, 1, 99, 100, 101, 345, 698, 699)
    for number in places:
        assert _texts(RowReader(sources, ["title", "text"], rows[number].position)) == expected[number + 1 :]


@NEEDS_DATASETS
@pytest.mark.parametrize("streaming", ["true", "false"])
def test_hub_data_sets(streaming: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.Dataset.from_list(RECORDS).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "plain.jsonl").write_bytes(LINES.replace(b"\n\n", b"\n").replace(b"\n\n", b"\n"))
    expected = [[record["title"], record["text"]] for record in RECORDS]
    for spec in (
        f"hf:{tmp_path}/saved?streaming={streaming}",
        f"hf:json?data_files={tmp_path}/plain.jsonl&streaming={streaming}",
    ):
        assert _texts(RowReader(expand_inputs([spec]), ["title", "text"])) == expected
        assert _texts(RowReader([spec], ["title", "text"], RowPosition(0, 300))) == expected[300:]
    shuffled = f"hf:{tmp_path}/saved?streaming={streaming}&shuffle=3&buffer_size=50"
    found = _texts(RowReader([shuffled], ["title", "text"]))
    assert found != expected and sorted(found) == sorted(expected)
    assert _texts(RowReader([shuffled], ["title", "text"], RowPosition(0, 300))) == found[300:]
    with pytest.raises(DataError, match="no field 'body'"):
        list(RowReader([f"hf:{tmp_path}/saved"], ["body"]))


def test_names_of_data_sets() -> None:
    for spec in ("hf:", "hf:c4?splt=train", "hf:c4?shuffle=yes", "hf:c4?streaming=1"):
        with pytest.raises(DataError, match="cannot be read from its name"):
            expand_inputs([spec])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", pytest.param("a.parquet", marks=NEEDS_ARROW)])
def test_cut_and_flipped_packed_files_are_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    MAKERS[name](path)
    whole = path.read_bytes()
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 16
    for content in (whole[: len(whole) // 2], whole[: len(whole) - 5], bytes(middle), b""):
        path.write_bytes(content)
        with pytest.raises(DataError) as error:
            [row_texts(row, ["text"]) for row in RowReader([str(path)])]
        assert str(path) in str(error.value.where)


@NEEDS_ARROW
def test_parquet_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    _parquet(path, [{"text": ["a", "b"], "none": None, "n": 1}, {"text": None, "none": None, "n": 2}])
    assert [row.fields for row in RowReader([str(path)], ["text", "none"])] == [(b"a\n\nb", b""), (b"", b"")]
    for key, message in (("n", "not text"), ("body", "no column 'body'")):
        with pytest.raises(DataError, match=message):
            list(RowReader([str(path)], [key]))


def test_sums_of_the_input(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(LINES)
    sums = tmp_path / "SHA256SUMS"
    sums.write_text(f"{hashlib.sha256(LINES).hexdigest()}  a.jsonl\n")
    check_sums([str(tmp_path / "a.jsonl")], sums)
    with pytest.raises(DataError, match="not in the list"):
        check_sums([str(tmp_path / "b.jsonl")], sums)
    (tmp_path / "a.jsonl").write_bytes(LINES.replace(b"document 3", b"document 4"))
    with pytest.raises(DataError, match="not the one"):
        check_sums([str(tmp_path / "a.jsonl")], sums)
    with pytest.raises(DataError, match="cannot be read"):
        check_sums([], tmp_path / "absent")


def test_bad_rows_are_set_aside_up_to_a_limit(tmp_path: Path) -> None:
    bad = [b'{"text": \n', b'{"body": "x"}\n', b'{"text": "caf\xe9"}\n']
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n' + bad[0] + b'{"text": "two"}\n' + bad[1] + bad[2])
    job, inputs, prefix = EncodeJob("CharLevelTokenizer"), [str(tmp_path / "a.jsonl")], str(tmp_path / "o")
    with pytest.raises(DataError, match=r"bad row 3, 2 are allowed") as error:
        encode_corpus(job, inputs, prefix, EncodeOptions(bad_row_limit=2))
    assert error.value.where == f"{inputs[0]}:5" and not (tmp_path / "o_bad_rows.jsonl").exists()
    done = encode_corpus(job, inputs, prefix, EncodeOptions(bad_row_limit=3))
    assert (done.documents, done.bad, done.tokens) == (5, 3, {"text_document": 6})
    aside = [json.loads(line) for line in (tmp_path / "o_bad_rows.jsonl").read_text().splitlines()]
    assert [entry["where"] for entry in aside] == [f"{inputs[0]}:{line}" for line in (2, 4, 5)]
    assert aside[2]["data"] == '{"text": "caf\\xe9"}\n' and "JSON" in aside[0]["what"]
    assert [IndexedDataset(f"{prefix}_text_document").get(i).tobytes()[::2] for i in (0, 1)] == [b"one", b"two"]
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n')
    encode_corpus(job, inputs, prefix)
    assert not (tmp_path / "o_bad_rows.jsonl").exists()  # it would speak of another run
