"""The range of transformers that folders are proved with: the line outside of it, said once, and one range in all places."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from megatron.export.pack import PackPlan, pack
from megatron.interop import tested_versions as proved
from megatron.interop.tested_versions import PROVED_TRANSFORMERS, say_if_unproved, warn_if_unproved

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("inside", ["5.16.0", "5.16.3", "5.20.1", "5.24.0", "5.24.9", "5.24.0.dev0"])
def test_silent_inside(inside: str) -> None:
    assert say_if_unproved(inside, "5.16.0", "5.24.0") is None


@pytest.mark.parametrize("outside", ["5.15.9", "4.57.1", "5.25.0", "5.25.0rc1", "5.100.0", "6.0.0", "main"])
def test_one_line_outside(outside: str) -> None:
    line = say_if_unproved(outside, "5.16.0", "5.24.0")
    assert line is not None and "\n" not in line
    assert f"5.16.0 to 5.24.0, and {outside} is installed" in line and '"transformers>=5.16,<5.25"' in line


def test_said_once_through_the_logger_of_transformers(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the module as proved.py holds it: up to 5.17, importing `pipeline` puts another one into sys.modules
    monkeypatch.setattr(proved.transformers, "__version__", "7.1.0")
    said_to = logging.getLogger("transformers")
    # a library of another test may have switched propagation on, and the root's handler would hear the line a second time
    monkeypatch.setattr(said_to, "propagate", False)
    said_to.addHandler(caplog.handler)
    try:
        for _ in range(3):
            warn_if_unproved(["5.16.0", "5.24.0"])
        for nothing in (None, [], "5.16.0", ["7.0.0", "7.2.0"]):
            warn_if_unproved(nothing)
    finally:
        said_to.removeHandler(caplog.handler)
    said = [record.getMessage() for record in caplog.records]
    assert said == [say_if_unproved("7.1.0", "5.16.0", "5.24.0")]


def test_requirements_give_the_same_range() -> None:
    text = (ROOT / "requirements" / "requirements.txt").read_text()
    found = re.search(r"^transformers>=(\d+)\.(\d+),<(\d+)\.(\d+)\b", text, re.MULTILINE)
    assert found is not None, "requirements.txt must bound transformers on both sides"
    lowest, newest = (tuple(map(int, version.split(".")[:2])) for version in PROVED_TRANSFORMERS)
    given = tuple(map(int, found.groups()))
    assert given == (*lowest, newest[0], newest[1] + 1)


def test_it_packs_and_runs_on_its_own() -> None:
    text = pack(PackPlan(entries=(("megatron.interop.tested_versions", "warn_if_unproved"),), title="t"))
    assert "megatron" not in re.sub(r"#.*|Modules:.*", "", text)
    space: dict[str, object] = {}
    exec(compile(text, "packed", "exec"), space)
    said = space["say_if_unproved"]("5.99.0", "5.16.0", "5.24.0")  # type: ignore[operator]
    assert "5.99.0 is installed" in said
