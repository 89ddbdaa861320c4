"""Links of the documents that stay inside the repository: the file exists, and so does the heading. No network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"(?<!\\)\[(?:[^\[\]]|\[[^\]]*\])*\]\(<?([^()\s>]+)>?(?: \"[^\"]*\")?\)")
FENCE = re.compile(r"^ {0,3}(```|~~~)")


def prose_lines(text: str) -> Iterator[str]:
    """The lines outside code blocks, without code spans."""
    inside = False
    for line in text.splitlines():
        if FENCE.match(line):
            inside = not inside
        elif not inside and not line.startswith("    "):
            yield re.sub(r"`[^`]*`", lambda code: "x" * len(code[0]), line) if "](" in line else line


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings and raw ids; both ways to write one where GitHub and MkDocs differ (`a--b`, `a-b`)."""
    names: set[str] = set()
    for line in prose_lines(text):
        names.update(re.findall(r"\bid=\"([^\"]+)\"", line))
        if heading := re.match(r"#{1,6} +(.+?) *#*$", line):
            words = re.sub(r"[^\w\s-]", "", heading[1].lower()).strip()
            names |= {words.replace(" ", "-"), re.sub(r"[-\s]+", "-", words)}
    return names


def broken(page: Path, root: Path = ROOT) -> list[str]:
    """The links of a page that lead nowhere."""
    targets = [target for line in prose_lines(page.read_text(encoding="utf-8")) for target in LINK.findall(line)]
    wrong = []
    for target in targets:
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        there = path.exists() and path.is_relative_to(root)
        if not there or (anchor and anchor not in anchors(path.read_text(encoding="utf-8"))):
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_inside_the_repository(page: Path) -> None:
    assert broken(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A `head_ing` & more\n")
    page = tmp_path / "page.md"
    good = "[a](other.md) [b](other.md#a-head_ing-more) [c](https://x.org/y#z) [d](#here) `[e](no.md)`\n# Here\n"
    page.write_text(f"{good}```\n[f](no.md)\n```\n")
    assert broken(page, tmp_path) == []
    page.write_text(good + "[g](no.md) [h](other.md#no) [i](#no) [`j`](../outside.md)\n")
    assert broken(page, tmp_path) == ["no.md", "other.md#no", "#no", "../outside.md"]
