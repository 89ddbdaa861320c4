"""Token files: equal to NeoX's own bytes, lossless, and never believed when damaged."""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.data.index_table import write_table
from megatron.data.indexed import IndexedDataset, IndexedWriter, dtype_for_vocab
from megatron.errors import DataError

WRITTEN = [
    "u16_multi_sentence", "i32_multi_sentence", "i32_large_ids", "i32_no_vocab_given", "u16_single_token",
    "u16_zero_length_seq", "code_uint8", "code_int8", "code_int16", "code_int64", "code_float32", "code_float64",
]  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_writer_makes_the_bytes_of_neox(name: str, golden: Path, tmp_path: Path) -> None:
    contents = {entry["name"]: entry for entry in json.loads((golden / "writer/contents.json").read_text())}
    entry = contents[name]
    with IndexedWriter(tmp_path / name, entry["dtype"]) as writer:
        for document in entry["documents"]:
            for sequence in document:
                writer.add_sequence(np.array(sequence, dtype=entry["dtype"]))
            writer.end_document()
    for suffix in (".bin", ".idx"):
        assert (tmp_path / (name + suffix)).read_bytes() == (golden / "writer" / (name + suffix)).read_bytes()
    sequences = [sequence for document in entry["documents"] for sequence in document]
    dataset = IndexedDataset(tmp_path / name)
    assert [dataset.get(i).tolist() for i in range(len(dataset))] == sequences


def test_merged_file_of_neox_is_read(golden: Path) -> None:
    merged = IndexedDataset(golden / "writer/merged")
    parts = [IndexedDataset(golden / f"preprocess/part{i}_text_document") for i in range(3)]
    assert merged.doc_idx.tolist() == [0]
    assert merged.sizes.tolist() == [size for part in parts for size in part.sizes.tolist()]
    assert merged.get(len(parts[0])).tolist() == parts[1].get(0).tolist()


def test_every_preprocessed_golden_file_opens(golden: Path) -> None:
    prefixes = sorted(str(path)[:-4] for path in (golden / "preprocess").glob("*.idx") if "cached" not in path.name)
    assert len(prefixes) > 10
    for prefix in prefixes:
        dataset = IndexedDataset(prefix)
        assert dataset.total_tokens == dataset.bin_path.stat().st_size // dataset.dtype.itemsize


def test_legacy_format_is_read(golden: Path) -> None:
    legacy = IndexedDataset(golden / "preprocess/hf_eod_cached_text_document")
    plain = IndexedDataset(golden / "preprocess/hf_eod_i32_text_document")
    assert legacy.legacy and not plain.legacy and legacy.dtype == plain.dtype
    assert np.array_equal(legacy.doc_idx, plain.doc_idx) and np.array_equal(legacy.offsets, plain.offsets)
    assert [legacy.get(i).tolist() for i in range(len(legacy))] == [plain.get(i).tolist() for i in range(len(plain))]
    written = io.BytesIO()
    write_table(written, plain.dtype, plain.sizes, plain.doc_idx, legacy=True)
    assert written.getvalue() == legacy.idx_path.read_bytes()


def test_dtype_boundary_is_that_of_neox() -> None:
    assert dtype_for_vocab(65499) == np.uint16
    assert dtype_for_vocab(65500) == dtype_for_vocab(None) == np.int32


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.lists(st.lists(st.integers(0, 65535), max_size=9), max_size=3), min_size=1, max_size=12),
    dtype=st.sampled_from(["uint16", "int32", "int64"]),
)
def test_round_trip(documents: list[list[list[int]]], dtype: str, tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", dtype) as writer:
        for document in documents:
            for sequence in document:
                writer.add_sequence(sequence)
            writer.end_document()
    flat = [sequence for document in documents for sequence in document]
    tokens = sum(map(len, flat))
    if tokens == 0:
        with pytest.raises(DataError, match="empty"):
            IndexedDataset(tmp_path / "x")
        return
    dataset = IndexedDataset(tmp_path / "x")
    assert [dataset.get(i).tolist() for i in range(len(dataset))] == flat
    assert dataset.doc_idx.tolist() == [0, *np.cumsum([len(document) for document in documents]).tolist()]
    assert dataset.total_tokens == tokens
    assert dataset.max_token() == max(token for sequence in flat for token in sequence)


def test_get_pieces_and_their_limits(corpus: str) -> None:
    dataset = IndexedDataset(corpus)
    whole = dataset.get(20)
    assert dataset.get(20, 3, 5).tolist() == whole[3:8].tolist()
    assert dataset.get(20, 21).tolist() == [] and dataset.get(20, 20).tolist() == [0]
    for arguments in ((40,), (-1,), (20, 0, 22), (20, -1, 2), (20, 2, -1), (20, 22)):
        with pytest.raises(DataError):
            dataset.get(*arguments)


def test_writer_refuses_tokens_that_do_not_fit(tmp_path: Path) -> None:
    for tokens in ([65536], [-1], [0.5]):
        with pytest.raises(DataError, match="does not fit"), IndexedWriter(tmp_path / "x", "uint16") as writer:
            writer.add_document(tokens)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_interrupted_writer_leaves_the_old_pair(corpus: str) -> None:
    before = {path.name: path.read_bytes() for path in Path(corpus).parent.iterdir()}
    writer = IndexedWriter(corpus, "uint16")
    writer.add_document([1, 2, 3])
    writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert {path.name: path.read_bytes() for path in Path(corpus).parent.iterdir()} == before


@pytest.mark.parametrize("failing_call", range(5))
def test_full_disk_leaves_the_old_pair_or_none(failing_call: int, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in Path(corpus).parent.iterdir()}
    calls = iter(range(100))

    def full(fd: int) -> None:
        if next(calls) == failing_call:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="space"), IndexedWriter(corpus, "uint16") as writer:
            writer.add_document([1, 2, 3])
    left = {path.name: path.read_bytes() for path in Path(corpus).parent.iterdir()}
    if failing_call < 2:  # the data did not reach the disk
        assert left == before
    else:  # only names were still to be set: never an index with the wrong tokens
        assert set(left) <= {"corpus.bin"}


def test_vocabulary_check_names_the_token(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.data.indexed.BLOCK", 100)
    dataset = IndexedDataset(corpus)
    dataset.check_vocabulary(dataset.max_token() + 1)
    dataset.check_vocabulary(1 << 16)
    with open(dataset.bin_path, "r+b") as handle:
        handle.seek(int(dataset.offsets[30]) + 2 * 4)
        handle.write(struct.pack("<H", 5000))
    with pytest.raises(DataError) as error:
        IndexedDataset(corpus).check_vocabulary(4096)
    assert "5000" in error.value.what and "sequence 30, token 4" in str(error.value.where)


def test_negative_token_and_floats_are_found(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "n", "int32") as writer:
        writer.add_document([4, -3, 2])
    with pytest.raises(DataError, match="-3"):
        IndexedDataset(tmp_path / "n").check_vocabulary(10)
    with IndexedWriter(tmp_path / "f", "float32") as writer:
        writer.add_document(np.ones(3, np.float32))
    with pytest.raises(DataError, match="no tokens"):
        IndexedDataset(tmp_path / "f").check_vocabulary(10)


def _patch(suffix: str, at: int, data: bytes) -> Callable[[str], None]:
    def damage(prefix: str) -> None:
        with open(prefix + suffix, "r+b") as handle:
            handle.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
            handle.write(data)

    return damage


def _resize(suffix: str, by: int) -> Callable[[str], None]:
    return lambda prefix: os.truncate(prefix + suffix, os.path.getsize(prefix + suffix) + by)


DAMAGES: dict[str, tuple[Callable[[str], None], str]] = {
    "no bin": (lambda prefix: os.unlink(prefix + ".bin"), "missing"),
    "no idx": (lambda prefix: os.unlink(prefix + ".idx"), "missing"),
    "magic": (_patch(".idx", 0, b"X"), "not a token index"),
    "version": (_patch(".idx", 9, b"\x02"), "version"),
    "dtype code": (_patch(".idx", 17, b"\x09"), "dtype code"),
    "wider dtype": (_patch(".idx", 17, b"\x04"), "offset"),
    "more sequences": (_patch(".idx", 18, struct.pack("<Q", 41)), "cut"),
    "absurd count": (_patch(".idx", 18, struct.pack("<Q", 2**63)), "cut"),
    "no sequences": (_patch(".idx", 18, struct.pack("<Q", 0)), "too long"),
    "more boundaries": (_patch(".idx", 26, struct.pack("<Q", 50)), "cut"),
    "negative size": (_patch(".idx", 34 + 4 * 3, struct.pack("<i", -1)), "sequence 3"),
    "wrong size": (_patch(".idx", 34 + 4 * 3, struct.pack("<i", 30)), "offset of sequence 4"),
    "wrong last size": (_patch(".idx", 34 + 4 * 39, struct.pack("<i", 30)), "too long"),
    "wrong offset": (_patch(".idx", 34 + 4 * 40 + 8 * 7, struct.pack("<q", 6)), "offset of sequence 7"),
    "boundary 0": (_patch(".idx", 34 + 12 * 40, struct.pack("<q", 1)), "start with 0"),
    "falling boundary": (_patch(".idx", 34 + 12 * 40 + 8 * 9, struct.pack("<q", 1)), "boundary 9"),
    "last boundary": (_patch(".idx", -8, struct.pack("<q", 41)), "last document boundary"),
    "cut header": (lambda prefix: os.truncate(prefix + ".idx", 20), "cut"),
    "empty idx": (lambda prefix: os.truncate(prefix + ".idx", 0), "not a token index"),
    "cut idx": (_resize(".idx", -1), "cut"),
    "long idx": (_resize(".idx", 8), "too long"),
    "cut bin": (_resize(".bin", -2), "cut"),
    "odd bin": (_resize(".bin", -1), "cut"),
    "long bin": (_resize(".bin", 2), "too long"),
    "empty bin": (lambda prefix: os.truncate(prefix + ".bin", 0), "cut"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_clear_error(name: str, corpus: str) -> None:
    damage, message = DAMAGES[name]
    damage(corpus)
    with pytest.raises(DataError, match=message) as error:
        IndexedDataset(corpus)
    assert corpus in str(error.value.where)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 34 + 12 * 40 + 8 * 41 - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_index_is_named_or_harmless(at: int, bit: int, corpus: str) -> None:
    clean = IndexedDataset(corpus)
    content = bytearray(clean.idx_path.read_bytes())
    content[at] ^= 1 << bit
    damaged = Path(corpus + "_damaged")
    damaged.with_suffix(".idx").write_bytes(content)
    damaged.with_suffix(".bin").write_bytes(clean.bin_path.read_bytes())
    try:
        read: Any = IndexedDataset(damaged)
    except DataError as error:
        where = str(error.where)
    else:
        where = ""
    if where:
        assert str(damaged) in where
        return
    # Left over: a boundary of a document (training does not use it), and a sign of the type of the tokens.
    assert read.sizes.tolist() == clean.sizes.tolist()
    assert at >= 34 + 12 * 40 or at == 17


def test_suffix_in_the_path_is_explained(corpus: str) -> None:
    with pytest.raises(DataError) as error:
        IndexedDataset(corpus + ".bin")
    assert "without its suffix" in str(error.value.hint)
