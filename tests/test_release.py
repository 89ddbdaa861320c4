"""A release is one version everywhere, and the files that are about it say what is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import linear_neox
import megatron

ROOT = Path(__file__).resolve().parents[1]


def citation() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    return content


def test_the_version_has_one_source() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'attr = "megatron.__version__"' in project and not re.search(r"^version = ", project.split("[tool")[0], re.M)
    assert linear_neox.__version__ == megatron.__version__
    assert citation()["version"] == megatron.__version__


def test_the_changelog_opens_with_this_version() -> None:
    headings = re.findall(r"^## (\S+) \((.+)\)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert headings[0] == (megatron.__version__, str(citation()["date-released"]))
    versions = [tuple(map(int, version.split("."))) for version, _ in headings]
    assert versions == sorted(versions, reverse=True) and len(set(versions)) == len(versions) > 1


def test_the_citation_has_the_fields_of_its_schema() -> None:
    """`cffconvert --validate` checks all of the schema; here are the parts that an edit breaks."""
    cff = citation()
    assert cff["cff-version"] == "1.2.0" and cff["type"] == "software" and cff["license"] == "Apache-2.0"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", str(cff["date-released"]))
    for entry in (cff, *cff["references"]):
        assert entry["title"] and entry["authors"]
        assert all(set(author) <= {"family-names", "given-names"} or set(author) == {"name"} for author in entry["authors"])
    named = {entry["identifiers"][0]["value"] for entry in cff["references"]}
    assert named == {f"arXiv:{paper}" for paper in ("2411.10741", "2402.18668", "2407.05483", "2108.12409")}
    assert {entry["type"] for entry in cff["references"]} <= {"article", "conference-paper"}


def test_the_security_note_names_tests_and_files_that_exist() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:tests|tools|docs|megatron)/[\w/.-]+)`|\]\(([\w/.-]+)\)", text))
    paths = {path or link for path, link in named}
    assert len(paths) > 10
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    for row in re.findall(r"^\|.*`tests/.*\|$", text, re.M):  # `tests/a/test_b.py`, `test_c.py`: the second is beside the first
        folder = ""
        for word in re.findall(r"`((?:tests/\w+/)?test_\w+\.py)`", row):
            folder = word.rpartition("/")[0] or folder
            assert (ROOT / folder / word.rpartition("/")[2]).is_file(), word


@pytest.mark.parametrize("option", ["--input-sums", "--no-checksums"])
def test_the_options_that_the_note_recommends(option: str) -> None:
    assert option in (ROOT / "tools/datasets/preprocess_data.py").read_text(encoding="utf-8")
