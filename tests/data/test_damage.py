"""Random damages: each is named with file and place or does no harm; none is silent, crashes, or takes memory."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron.data.checksums import BLOCK_BYTES, verify_blocks, write_checksums
from megatron.data.indexed import IndexedDataset, IndexedWriter
from megatron.data.order import build_sample_index
from megatron.data.order_cache import cached_sample_index
from megatron.data.token_format import sums_file
from megatron.errors import DataError
from tests.data.damages import Bench


def _run(bench: Bench, folder: Path, seeds: range) -> Counter[str]:
    verdicts: Counter[str] = Counter()
    for seed in seeds:
        done, verdict = bench.try_one(seed, folder / "scratch")
        assert verdict in ("named", "contained", "harmless"), (seed, done, verdict)
        verdicts[verdict] += 1
    return verdicts


def test_a_hundred_damages(tmp_path: Path) -> None:
    """Every file is below 64 KiB; what else is held at most are Python's modules and a reader's blocks of 256 KiB."""
    bench = Bench(tmp_path / "healthy")
    tracemalloc.start()
    try:
        verdicts = _run(bench, tmp_path, range(100))
        assert tracemalloc.get_traced_memory()[1] < 6 << 20
    finally:
        tracemalloc.stop()
    assert verdicts["named"] > 85, verdicts


@pytest.mark.slow
def test_four_hundred_more_damages(tmp_path: Path) -> None:
    """Without a look at the memory, which takes two thirds of the time."""
    verdicts = _run(Bench(tmp_path / "healthy"), tmp_path, range(1000, 1400))
    print(dict(verdicts))
    assert sum(verdicts.values()) == 400 and verdicts["named"] > 360, verdicts


def test_a_flipped_bit_in_the_tokens_is_found_and_placed(corpus: str) -> None:
    write_checksums(corpus, block=64)
    assert verify_blocks(corpus)
    path = IndexedDataset(corpus).bin_path
    content = bytearray(path.read_bytes())
    content[5 * 64 + 7] ^= 1
    path.write_bytes(content)
    IndexedDataset(corpus)  # opening looks at the ends only
    with pytest.raises(DataError) as error:
        verify_blocks(corpus)
    assert str(path) == error.value.where and "bytes 320..383 (block 5)" in str(error.value.why)
    content[5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="not the one its checksums"):
        IndexedDataset(corpus)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255), cut=st.booleans())
@example(at=0.4375, value=64, cut=False)  # bit 62 of an offset, which times four bytes a token overflows to the right number
def test_a_damaged_legacy_index_is_named_or_harmless(at: float, value: int, cut: bool, golden: Path, tmp_path: Path) -> None:
    source = golden / "preprocess/hf_eod_cached_text_document"
    clean, content = IndexedDataset(source), bytearray(source.with_suffix(".idx").read_bytes())
    place = int(at * len(content))
    content[place] ^= value
    (tmp_path / "x.idx").write_bytes(content[:place] if cut else content)
    (tmp_path / "x.bin").write_bytes(clean.bin_path.read_bytes())
    try:
        read = IndexedDataset(tmp_path / "x")
    except DataError as error:
        where = str(error.where)
    else:
        # What is left over: a boundary of a document, which training does not use.
        assert not cut and place >= len(content) - 8 * len(clean.doc_idx)
        assert np.array_equal(read.sizes, clean.sizes) and np.array_equal(read.offsets, clean.offsets)
        return
    assert str(tmp_path / "x") in where


def test_a_rank_that_waits_maps_what_another_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks of a host ask for the same index at the same time: it is built once."""
    with IndexedWriter(tmp_path / "c", "uint16") as writer:
        for size in range(1, 200):
            writer.add_document([1] * size)
    sizes, built = IndexedDataset(tmp_path / "c").sizes, []

    def slow(*arguments: Any) -> Any:
        built.append(threading.get_ident())
        time.sleep(0.3)
        return build_sample_index(*arguments)

    monkeypatch.setattr("megatron.data.order_cache.build_sample_index", slow)

    def ask(_: int) -> Any:
        return cached_sample_index(tmp_path / "c", "train", range(199), sizes, 16, 90, 3, small=0)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(ask, range(2))
    assert len(built) == 1 and np.array_equal(first.doc_idx, second.doc_idx)
    assert isinstance(first.shuffle_idx, np.memmap) and isinstance(second.shuffle_idx, np.memmap)


def test_writing_a_corpus_again_drops_what_was_said_about_the_old_one(corpus: str) -> None:
    write_checksums(corpus)
    with IndexedWriter(corpus, "uint16") as writer:
        writer.add_document([1, 2, 3])
    assert not sums_file(corpus).exists() and not verify_blocks(corpus) and BLOCK_BYTES == 1 << 24
