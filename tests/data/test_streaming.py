"""Text that is tokenised while it is trained on: the same samples for every world, and a cursor that resumes exactly."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.data.batches import MicroBatchLoader
from megatron.data.readers import RowReader
from megatron.data.streaming import StreamDataset, open_stream_dataset
from megatron.data.tokenizers import CharLevelTokenizer, build_tokenizer
from megatron.errors import DataError
from tests.data.hf_files import SENTENCE, around, write

LENGTH = 16


@pytest.fixture
def source(tmp_path: Path) -> str:
    """180 documents in two files, of 0 to 40 bytes; the same text gives the same stream whatever the files are."""
    texts = ["x" * (i % 5 == 0) + "abcdefghij klm\n"[: i % 13] * (i % 4) for i in range(180)]
    for name, part in (("a", texts[:100]), ("b", texts[100:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in part))
    return str(tmp_path)


def _open(source: str, saved: dict[str, Any] | None = None, size: int = 200, **options: Any) -> StreamDataset:
    return open_stream_dataset([source], CharLevelTokenizer(), LENGTH, size, saved, key="body", **options)


def _whole(source: str, epochs: int) -> list[int]:
    """All tokens, each text ended by the eod."""
    files = [str(path) for path in sorted(Path(source).iterdir())]
    texts = [json.loads(row.data)["body"] for row in RowReader(files, ["body"])]
    return [token for text in texts if text for token in [*text.encode(), 0]] * epochs


def test_samples_are_windows_of_the_stream(source: str, caplog: pytest.LogCaptureFixture) -> None:
    tokens, dataset = _whole(source, 3), _open(source)
    assert len(dataset) == 200 and len(tokens) > 200 * LENGTH > len(tokens) / 3
    with caplog.at_level(logging.WARNING):
        for i in range(200):
            assert dataset[i].tolist() == tokens[i * LENGTH : i * LENGTH + LENGTH + 1]
    assert "starts over" in caplog.text


def test_resume_at_every_sample(source: str) -> None:
    dataset, expected = _open(source), _open(source)
    for i in range(200):
        saved = json.loads(json.dumps(dataset.cursor(i)))
        assert saved["sample"] == i
        again = _open(source, saved)
        assert again[i].tolist() == dataset[i].tolist() == expected[i].tolist()
        if i < 199:
            assert again[i + 1].tolist() == expected[i + 1].tolist()
    assert dataset.cursor(200)["sample"] == 200


def _steps(readers: list[MicroBatchLoader], steps: int) -> list[list[tuple[int, list[int]]]]:
    iterators = [iter(reader) for reader in readers]
    found = []
    for _ in range(steps):
        step: list[tuple[int, list[int]]] = []
        for iterator in iterators:
            for _ in range(readers[0].gradient_accumulation):
                batch = next(iterator)
                step += zip(batch.sample_ids, batch.tokens.tolist(), strict=True)
        found.append(sorted(step))
    return found


@pytest.mark.parametrize("threads", [0, 3])
def test_every_world_sees_the_same_and_resumes(threads: int, source: str) -> None:
    expected = _steps([MicroBatchLoader(_open(source), 8, 0, 1)], 12)
    for world, micro in ((1, 2), (2, 2), (4, 1), (4, 2)):

        def run(saved: dict[str, Any] | None, world: int = world, micro: int = micro) -> list[MicroBatchLoader]:
            start = {} if saved is None else {"start_sample": saved["next_sample"], "start_tokens": saved["consumed_tokens"]}
            stream = None if saved is None else saved["stream"]
            return [
                MicroBatchLoader(_open(source, stream), micro, rank, world, 8 // (world * micro), num_workers=threads, **start)
                for rank in range(world)
            ]  # fmt: skip

        first = run(None)
        assert _steps(first, 5) == expected[:5]
        states = [json.loads(json.dumps(reader.state())) for reader in first]
        assert all(state == states[0] for state in states) and states[0]["consumed_tokens"] == 40 * LENGTH
        assert _steps(run(states[0]), 7) == expected[5:]


def test_the_end_and_the_past(source: str) -> None:
    dataset = StreamDataset(
        lambda place: iter(RowReader([f"{source}/a.jsonl"], ["body"], place)),
        CharLevelTokenizer(), LENGTH, 10**6, key="body", repeat=False, window=4,
    )  # fmt: skip
    dataset[20]
    with pytest.raises(DataError, match="no longer available"):
        dataset[16]
    with pytest.raises(DataError, match="stream ended"):
        dataset[10**6 - 1]
    with pytest.raises(DataError, match="does not exist"):
        dataset[-1]
    (Path(source) / "a.jsonl").write_text('{"body": ""}\n')
    (Path(source) / "b.jsonl").unlink()
    with pytest.raises(DataError, match="no text"):
        _open(source)[0]
    with pytest.raises(DataError, match="entries"):
        _open(source, vocab_size=100)
    with pytest.raises(DataError, match="out of range"):
        StreamDataset(lambda place: iter(()), CharLevelTokenizer(), 0, 5)


def test_a_stream_holds_what_the_template_adds(source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a corpus does, and without what else the file stores."""
    (Path(source) / "a.jsonl").write_text(json.dumps({"body": SENTENCE * 20}) + "\n")
    path = write(tmp_path / "t.json", lambda made: (around("<s>", "")(made), made.enable_truncation(8)))
    plain = build_tokenizer("HFTokenizer", write(tmp_path / "plain.json")).tokenize(SENTENCE * 20)
    sample = open_stream_dataset([f"{source}/a.jsonl"], build_tokenizer("HFTokenizer", path), 122, 2, key="body")[0]
    assert sample.tolist() == [270, *plain, 0] and len(plain) == 121
    assert [record.message for record in caplog.records] == [
        "the tokenizer's file stores truncation to 8 tokens, which is not used",
        "the tokenizer's template adds <s> at the start of each document;"
        " the end-of-document token <|endoftext|> is appended after it",
    ]


def test_a_bad_row_is_named(source: str) -> None:
    with open(Path(source) / "a.jsonl", "a") as handle:
        handle.write("\n{\n")
    with pytest.raises(DataError, match="not JSON") as error:
        np.stack([_open(source)[i] for i in range(80)])
    assert "a.jsonl:101" in str(error.value.where)
