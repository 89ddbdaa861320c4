"""Where the golden files lie, and small corpora that several tests share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.data.indexed import IndexedWriter


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


@pytest.fixture(scope="session")
def golden(golden_neox: Path) -> Path:
    """The folder of files that the official NeoX code produced."""
    return golden_neox


@pytest.fixture(scope="session")
def golden_json(golden: Path) -> Callable[[str], Any]:
    return lambda name: json.loads((golden / name).read_text("utf-8"))


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """Prefix of a corpus of 40 documents of 0..39 tokens, ids 1..98, each but the first ended by token 0; u16."""
    prefix = tmp_path / "corpus"
    with IndexedWriter(prefix, "uint16") as writer:
        for size in range(40):
            writer.add_document([1 + (7 * size + i) % 98 for i in range(size)] + ([0] if size else []))
    return str(prefix)
