"""A file of a built-in corpus that is not there: the message names the command that makes it, on a fresh clone above all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import run_here

from megatron.data.corpora import CORPORA
from megatron.data.corpus_request import BUILT_IN, command_that_makes
from megatron.data.indexed import IndexedDataset
from megatron.data.tokenizers import build_tokenizer
from megatron.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


def test_every_built_in_corpus_has_its_command() -> None:
    assert set(BUILT_IN) == set(CORPORA)
    assert command_that_makes("data/enwik8/tokenizer.json") == "python prepare_data.py enwik8"
    assert command_that_makes("/big disk/pystdlib/a.bin") == "python prepare_data.py pystdlib --data-dir '/big disk'"
    assert command_that_makes("data/mine/tokenizer.json") is None
    assert command_that_makes("pystdlib/tokenizer.json") == "python prepare_data.py pystdlib --data-dir ."


def test_tokenizer_and_tokens(tmp_path: Path) -> None:
    command = f"python prepare_data.py pystdlib --data-dir {tmp_path} makes it"
    for action in (
        lambda: build_tokenizer("HFTokenizer", tmp_path / "pystdlib" / "tokenizer.json"),
        lambda: IndexedDataset(tmp_path / "pystdlib" / "pystdlib_text_document"),
    ):
        with pytest.raises(DataError) as caught:
            action()
        assert caught.value.hint == command
    with pytest.raises(DataError) as caught:
        build_tokenizer("HFTokenizer", tmp_path / "other" / "tokenizer.json")
    assert caught.value.hint == "correct vocab_file"


@pytest.mark.parametrize("name", ["metala-quickstart", "based-quickstart", "jrt-quickstart"])
def test_quickstarts_without_data(name: str, tmp_path: Path) -> None:
    config = (ROOT / "configs" / f"{name}.yml").resolve()
    done = run_here("train.py", config, "--set", f"run_dir={tmp_path}/run", "--set", "load=null", cwd=tmp_path)
    assert done.returncode == 3 and "python prepare_data.py pystdlib makes it" in done.stderr, done.stderr
