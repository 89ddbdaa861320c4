"""A killed preprocessing goes on where it was and ends in the same bytes; nothing is left of the interruption."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest

from megatron.data import encode
from megatron.data.encode import EncodeJob, EncodeOptions, encode_corpus
from megatron.data.indexed import IndexedDataset
from megatron.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[2]
ALWAYS = EncodeOptions(bad_row_limit=50, commit_seconds=0.0)
JOB = EncodeJob("CharLevelTokenizer", keys=("text", "title"), append_eod=True)


def _write(path: Path, documents: int) -> str:
    """Rows of which some are empty and some are bad."""
    random_ = random.Random(documents)
    with open(path, "w") as handle:
        for i in range(documents):
            text = "".join(random_.choices("abc de\n", k=random_.randrange(0, 60)))
            handle.write("{\n" if i % 97 == 5 else json.dumps({"text": text, "title": f"t{i}"}) + "\n")
    return str(path)


def _made(folder: Path) -> dict[str, bytes]:
    """All files but the record, whose content holds nothing but what the others do."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class _Killed(BaseException):
    """As abrupt as Python allows inside one process."""


def _kill_at(patch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """Let the `call`-th use of a function of `encode` be its last, before or after it did its work."""
    whole, count = getattr(encode, name), 0

    def stop(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2 * call:
            raise _Killed
        result = whole(*arguments, **options)
        if count == 2 * call + 1:
            raise _Killed
        return result

    patch.setattr(encode, name, stop)


@pytest.mark.parametrize("name", ["write_json", "publish_pair", "write_meta", "write_checksums", "remove_partial_files"])
def test_an_interrupt_anywhere_ends_in_the_same_bytes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.data.encoder._BATCH_ROWS", 50)
    source = _write(tmp_path / "a.jsonl", 400)
    encode_corpus(JOB, [source], str(tmp_path / "whole" / "o"), ALWAYS)
    expected = _made(tmp_path / "whole")
    assert "o_bad_rows.jsonl" in expected and len(expected) == 9
    for call in range(6):
        folder = tmp_path / f"{name}{call}"
        with monkeypatch.context() as patch:
            _kill_at(patch, name, call)
            with contextlib.suppress(_Killed):
                encode_corpus(JOB, [source], str(folder / "o"), ALWAYS)
        done = encode_corpus(JOB, [source], str(folder / "o"), ALWAYS)
        assert _made(folder) == expected and done.documents == 400 and done.bad == 5


def test_an_interrupted_run_of_other_input_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.data.encoder._BATCH_ROWS", 50)
    source = _write(tmp_path / "a.jsonl", 300)
    with monkeypatch.context() as patch:
        _kill_at(patch, "write_json", 2)
        with pytest.raises(_Killed):
            encode_corpus(JOB, [source], str(tmp_path / "x/o"), ALWAYS)
    source = _write(tmp_path / "a.jsonl", 301)
    assert encode_corpus(JOB, [source], str(tmp_path / "x/o"), ALWAYS).resumed_at == 0
    encode_corpus(JOB, [source], str(tmp_path / "y/o"), ALWAYS)
    assert _made(tmp_path / "x") == _made(tmp_path / "y")


def test_a_bad_row_late_in_a_run_does_not_cost_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.data.encoder._BATCH_ROWS", 50)
    source = _write(tmp_path / "a.jsonl", 400)
    with pytest.raises(DataError, match="bad row 4"):
        encode_corpus(JOB, [source], str(tmp_path / "x/o"), EncodeOptions(bad_row_limit=3, commit_seconds=0.0))
    done = encode_corpus(JOB, [source], str(tmp_path / "x/o"), ALWAYS)
    assert done.resumed_at == 250 and done.bad == 5
    encode_corpus(JOB, [source], str(tmp_path / "y/o"), ALWAYS)
    assert _made(tmp_path / "x") == _made(tmp_path / "y")


def test_two_processes_do_not_write_one_output(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.jsonl", 10)
    run = encode._Run(JOB, lambda start: encode.RowReader([source], JOB.keys, start), str(tmp_path / "o"), ALWAYS)
    writer = encode.PartialPair(*run.outputs[0])
    with pytest.raises(DataError, match="another process"):
        encode_corpus(JOB, [source], str(tmp_path / "o"), ALWAYS)
    writer.discard()


def _kill_until_done(command: list[str], kills: int, longest: float, seed: int, made: Path) -> int:
    """Start the command again and again, killing it with all its children at random moments; the last start may end.

    Where it ended before its kill, what it `made` is removed: a second run would find it and have nothing to be killed in.
    """
    random_, killed = random.Random(seed), 0
    while True:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        try:
            _, errors = process.communicate(timeout=random_.uniform(0.05, longest) if killed < kills else None)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            killed += 1
            continue
        assert process.returncode == 0, errors.decode()
        if killed >= kills:
            return killed
        shutil.rmtree(made)


@pytest.mark.slow
def test_killed_processes(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.jsonl", 20_000)
    script = str(REPOSITORY / "tools/datasets/preprocess_data.py")
    common = [sys.executable, script, "--input", source, "--tokenizer-type", "CharLevelTokenizer", "--bad-row-limit", "999"]
    subprocess.run([*common, "--output-prefix", str(tmp_path / "y/o")], check=True, capture_output=True)
    _kill_until_done([*common, "--output-prefix", str(tmp_path / "x/o")], 4, 0.7, 1, tmp_path / "x")
    assert _made(tmp_path / "x") == _made(tmp_path / "y")
    IndexedDataset(tmp_path / "x/o_text_document")


@pytest.mark.slow
def test_prepare_data_killed_at_random_moments(tmp_path: Path) -> None:
    """Three kills on a few packages here; `PREPARE_DATA_KILLS=30`, on the whole library, is what the project was accepted with."""
    kills = int(os.environ.get("PREPARE_DATA_KILLS", "3"))
    library = Path(sysconfig.get_path("stdlib"))
    if "PREPARE_DATA_KILLS" not in os.environ:
        for package in ("asyncio", "email", "http", "json", "logging", "unittest"):
            shutil.copytree(library / package, tmp_path / "library" / package)
        library = tmp_path / "library"
    code = f"import runpy, sysconfig; sysconfig.get_path = lambda name: {str(library)!r}; "
    code += f"runpy.run_path({str(REPOSITORY / 'prepare_data.py')!r}, run_name='__main__')"
    command = [sys.executable, "-c", code, "pystdlib", "-d"]
    begin = time.monotonic()
    subprocess.run([*command, str(tmp_path / "y")], check=True, capture_output=True)
    whole = time.monotonic() - begin
    assert _kill_until_done([*command, str(tmp_path / "x")], kills, whole, 2, tmp_path / "x") == kills
    left, right = (_made(tmp_path / name / "pystdlib") for name in "xy")
    receipts = [json.loads(made.pop("receipt.json")) for made in (left, right)]
    assert left == right and receipts[0]["sha256"] == receipts[1]["sha256"]
