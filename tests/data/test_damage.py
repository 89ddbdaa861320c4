"""Random damages: each is named with file and place or does no harm; none is silent, crashes, or takes memory."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from damages import Bench

from megatron.data.checksums import BLOCK_BYTES, verify_blocks, write_checksums
from megatron.data.indexed import IndexedDataset, IndexedWriter
from megatron.data.token_format import sums_file
from megatron.errors import DataError


def _run(folder: Path, seeds: range) -> Counter[str]:
    bench = Bench(folder / "healthy")
    verdicts: Counter[str] = Counter()
    tracemalloc.start()
    try:
        for seed in seeds:
            done, verdict = bench.try_one(seed, folder / "scratch")
            assert verdict in ("named", "contained", "harmless"), (seed, done, verdict)
            verdicts[verdict] += 1
        # Every file here is below 64 KiB; the rest is Python's modules and a reader's blocks of 256 KiB.
        assert tracemalloc.get_traced_memory()[1] < 6 << 20
    finally:
        tracemalloc.stop()
    return verdicts


def test_two_hundred_damages(tmp_path: Path) -> None:
    verdicts = _run(tmp_path, range(200))
    assert verdicts["named"] > 170, verdicts


@pytest.mark.slow
def test_a_thousand_damages(tmp_path: Path) -> None:
    verdicts = _run(tmp_path, range(1000, 2000))
    print(dict(verdicts))
    assert sum(verdicts.values()) == 1000 and verdicts["named"] > 900, verdicts


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


def test_writing_a_corpus_again_drops_what_was_said_about_the_old_one(corpus: str) -> None:
    write_checksums(corpus)
    with IndexedWriter(corpus, "uint16") as writer:
        writer.add_document([1, 2, 3])
    assert not sums_file(corpus).exists() and not verify_blocks(corpus) and BLOCK_BYTES == 1 << 24
