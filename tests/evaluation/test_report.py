"""The table, the plot, and the measured stream."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron.data.tokenizers import CharLevelTokenizer
from megatron.errors import DataError
from megatron.evaluation.documents import corpora_tokens, measured, split_tokens
from megatron.evaluation.report import plot_lengths, table
from tests.evaluation.corpus import write_corpus

ROW = {"length": 128, "stride": 128, "passes": 3, "perplexity": 12.5, "seconds": 0.2}


def test_table_has_one_line_per_length() -> None:
    text = table([{**ROW, "word_perplexity": 99.0, "bits_per_byte": 1.25}, {"length": 256, "stride": 32, "error": "too long"}])
    lines = text.splitlines()
    assert len(lines) == 3 and "12.5000" in lines[1] and "1.2500" in lines[1] and lines[2].endswith("too long")
    assert "-" in table([ROW]).splitlines()[1]


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [ROW, {**ROW, "length": 256, "perplexity": 20.0}, {"length": 512, "stride": 1, "error": "no"}]
    image = plot_lengths({"alibi": rows, "alibi, sliding": rows}, tmp_path / "a.png", "title", 128)
    assert image.read_bytes().startswith(b"\x89PNG")


def test_splits_and_limits(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", [[1, 2, 3], [4, 5], [6], [7, 8]])
    assert split_tokens(prefix, "50,25,25", "train").tolist() == [1, 2, 3, 4, 5]
    assert split_tokens(prefix, "50,25,25", "test").tolist() == [7, 8]
    assert split_tokens(prefix, "50,25,25", "train", 4).tolist() == [1, 2, 3, 4]
    assert corpora_tokens([prefix, prefix], 10).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 1, 2]
    with pytest.raises(DataError, match="nothing to evaluate"):
        split_tokens(prefix, "100,0,0", "valid")


def test_words_and_bytes_of_the_text() -> None:
    text = "two words\nünd\n"
    tokenizer = CharLevelTokenizer()
    tokens = [*tokenizer.tokenize(text), tokenizer.eod, *tokenizer.tokenize("end")]
    found = measured(np.asarray(tokens), tokenizer)
    assert found.words == 3 + 2 + 1 and found.size == len((text + "end").encode())
