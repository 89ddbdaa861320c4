"""What fuzzing found stays found, and every reader is tried on a few new cases: `python -m tests.faults.fuzz` looks further."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.errors import DataError
from tests.faults import fuzz
from tests.faults.fuzz_readers import READERS, Reader

KEPT = Path(__file__).parent / "fuzz_cases"
CASES = sorted(KEPT.glob("*/*"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}-{case.name}")
def test_a_case_that_was_found(case: Path, tmp_path: Path) -> None:
    """The reader's seeds with the kept files over them end in a result or in one message."""
    reader = READERS[case.parent.name]
    reader.seeds(tmp_path)
    shutil.copytree(case, tmp_path, dirs_exist_ok=True)
    assert fuzz.in_child(reader, tmp_path) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in READERS if name not in ("hf", "sentencepiece")])
def test_new_cases(name: str) -> None:
    """The same cases each time; longer runs are the command's."""
    found = fuzz.fuzz(name, minutes=1, seed=20261126, most=12)
    assert found["cases"] == 12 and found["findings"] == {}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_something_else_in_place_of_a_file(name: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    """Each file of a reader's seeds in turn: a pipe must not be waited for."""
    reader, problems = READERS[name], {}
    (tmp_path / "seeds").mkdir()
    reader.seeds(tmp_path / "seeds")
    files = [path.relative_to(tmp_path / "seeds") for path in sorted((tmp_path / "seeds").rglob("*")) if path.is_file()]
    for file in files:
        shutil.copytree(tmp_path / "seeds", tmp_path / "case", symlinks=True)
        (tmp_path / "case" / file).unlink()
        make(tmp_path / "case" / file)
        if problem := fuzz.in_child(reader, tmp_path / "case"):
            problems[str(file)] = problem
        shutil.rmtree(tmp_path / "case")
    assert files and not problems


def _defect(root: Path) -> None:
    raise ValueError("a defect")


def _greedy(root: Path) -> None:
    for _ in range(8):
        (root / "x").write_bytes(bytes(1 << 28) * 8)


def _crash(root: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _said(root: Path) -> None:
    raise DataError("said")


def _left(root: Path) -> None:
    raise SystemExit(2)


def _endless(root: Path) -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("read", "says"),
    [
        (_defect, "ValueError at test_fuzz.py"),
        (_greedy, "MemoryError at test_fuzz.py"),
        (_crash, "signal SIGSEGV"),
        (_endless, "more than 1 s of processor time"),
        (_said, ""),
        (_left, ""),
        (lambda root: None, ""),
    ],
)
def test_what_a_child_reports(read: Callable[[Path], None], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    found = fuzz.in_child(Reader(lambda root: None, read), tmp_path)
    assert found.startswith(says) and bool(found) == bool(says)
