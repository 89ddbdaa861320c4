"""The fenced blocks of the documentation, and the comments that say what a test does with them.

A comment stands alone on the line before its fence:

    <!-- run -->                                 a shell or Python block that runs in CI
    <!-- run: train_iters=4, seq_length=64 -->   the same; its training commands get `--set KEY=VALUE` each
    <!-- output -->                              lines that the block before prints, in this order; `...` is a wildcard
    <!-- output: any numbers -->                 the same; a number stands for any number (`--set` has made the run smaller)
    <!-- setup: COMMAND -->                      anywhere: a command that runs here and that readers do not see
    <!-- after: get-started.md -->               anywhere: the page starts in the folder that the other page has left

All blocks of a page that run form one bash script, under `set -euo pipefail`, in a copy of the checkout with its own runs/ and
data/. The commands of all shell blocks, indented ones too, are checked without running them (tests/docs/command_lines.py).

    python -m tests.docs.blocks --count          how many blocks and commands run and are checked, page by page
    python -m tests.docs.blocks docs/faq.md      run pages, and print what each block prints
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHELLS = ("bash", "sh", "shell", "console")
_FENCE = re.compile(r"^( *)(```+|~~~+)\s*([\w+-]*)[^`]*$")
_COMMENT = re.compile(r"^\s*<!--\s*(run|output|after|setup)\b(.*?)-->\s*$", re.IGNORECASE)
_INDENTED = re.compile(r"^ {4,}(?:\w+=\S+ )*(?:python|linear-neox|torchrun|srun|make) ")
_SETTING = re.compile(r"[\w.]+=[^,]+(?:,(?!\s*[\w.]+=)[^,]+)*")


class PageError(Exception):
    """A page that cannot be read as its author meant it."""


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        line: number of the opening fence, from 1. language: the word after it.
        lines: the text between the fences, without the fence's indentation.
        runs: the block is marked to run. settings: `KEY=VALUE` for its training commands.
        output: the block is expected output of the block before. any_numbers: numbers in it may differ.
    """

    line: int
    language: str
    lines: tuple[str, ...]
    runs: bool = False
    settings: tuple[str, ...] = ()
    output: bool = False
    any_numbers: bool = False

    @property
    def is_shell(self) -> bool:
        """Whether the block holds shell commands."""
        return self.language in SHELLS


@dataclass(frozen=True)
class Page:
    """A page of the documentation.

    Attributes:
        path: its file. blocks: in its order. length: in lines.
        setup: (line, command) of the commands that readers do not see. after: the page that it continues.
    """

    path: Path
    blocks: tuple[Block, ...]
    length: int
    setup: tuple[tuple[int, str], ...] = ()
    after: Path | None = None

    @property
    def name(self) -> str:
        """Path from the checkout's root."""
        return str(self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path)

    @property
    def running(self) -> tuple[Block, ...]:
        """The blocks that run."""
        return tuple(block for block in self.blocks if block.runs)


def page_paths() -> list[Path]:
    """README.md, CONTRIBUTING.md and all pages under docs/."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _settings(text: str, where: str) -> tuple[str, ...]:
    settings = tuple(item.strip() for item in _SETTING.findall(text))
    if re.sub(r"[\s,]", "", text) != re.sub(r"[\s,]", "", "".join(settings)):
        raise PageError(f"{where}: '{text.strip()}' is not KEY=VALUE, KEY=VALUE")
    return settings


def _marked(kind: str, text: str, where: str) -> dict[str, object]:
    """The fields of the block after a comment."""
    colon, rest = text.strip()[:1], text.strip()[1:].strip()
    if kind == "run" and (colon == ":" or not colon):
        return {"runs": True, "settings": _settings(rest, where)}
    if kind == "output" and (not colon or (colon == ":" and rest == "any numbers")):
        return {"output": True, "any_numbers": bool(colon)}
    raise PageError(f"{where}: unknown comment <!-- {kind}{text.rstrip()} -->; see tests/docs/blocks.py")


def read_page(path: Path) -> Page:
    """Read a page.

    Raises:
        PageError: a comment is misspelt or has no block, a fence stays open, output follows no block that runs.
    """
    blocks: list[Block] = []
    setup: list[tuple[int, str]] = []
    lines, after, marked, number = path.read_text(encoding="utf-8").splitlines(), None, dict[str, object](), 0
    while number < len(lines):
        number, text = number + 1, lines[number]
        where = f"{path.name}:{number}"
        if comment := _COMMENT.match(text):
            kind, rest = comment[1], comment[2]
            if kind == "after" and rest.strip().startswith(":"):
                after = (path.parent / rest.strip()[1:].strip()).resolve()
                if not after.is_file():
                    raise PageError(f"{where}: there is no page {after}")
                continue
            if kind == "setup" and rest.strip().startswith(":"):
                setup.append((number, rest.strip()[1:].strip()))
                continue
            marked = _marked(kind, rest, where)
            if number == len(lines) or not _FENCE.match(lines[number]):
                raise PageError(f"{where}: the comment is not on the line before a block")
        elif fence := _FENCE.match(text):
            end = _end(lines, number, fence[1] + fence[2], where)
            block = Block(number, fence[3].lower(), tuple(_dedented(lines[number:end], len(fence[1]))), **marked)  # type: ignore[arg-type]
            if block.runs and not block.is_shell and block.language != "python":
                raise PageError(f"{where}: a block of '{block.language}' cannot run")
            if block.settings and block.language == "python":
                raise PageError(f"{where}: settings are for training commands of shell blocks")
            if block.output and not any(earlier.runs for earlier in blocks):
                raise PageError(f"{where}: no block runs before this output")
            blocks.append(block)
            marked, number = {}, end + 1
        elif _INDENTED.match(text) and (number == 1 or not lines[number - 2].strip()):
            end = next((i for i in range(number, len(lines)) if not lines[i].startswith("    ")), len(lines))
            blocks.append(Block(number - 1, "bash", tuple(_dedented(lines[number - 1 : end], 4))))
            number = end
    return Page(path, tuple(blocks), len(lines), tuple(setup), after)


def _end(lines: list[str], start: int, fence: str, where: str) -> int:
    """Index of the closing fence."""
    for index in range(start, len(lines)):
        if lines[index].rstrip() == fence:
            return index
    raise PageError(f"{where}: the block is not closed")


def _dedented(lines: list[str], indentation: int) -> Iterator[str]:
    for line in lines:
        yield line[min(indentation, len(line) - len(line.lstrip(" "))) :]


def main(arguments: list[str] | None = None) -> int:
    """Count, or run pages."""
    from tests.docs.command_lines import commands_of, our_commands
    from tests.docs.session import Session

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, help="pages to run (default: all)")
    parser.add_argument("--count", action="store_true", help="count blocks and commands, run nothing")
    args = parser.parse_args(arguments)
    pages = [read_page(path.resolve()) for path in args.pages or page_paths()]
    if args.count:
        totals = [0, 0, 0, 0]
        print(f"{'page':40} {'blocks run':>10} {'commands run':>12} {'shell blocks':>12} {'our commands':>12}")
        for page in pages:
            shell, running = [b for b in page.blocks if b.is_shell], page.running
            ran = sum(len(commands_of(block)) if block.is_shell else 1 for block in running)
            row = [len(running), ran, len(shell), len(our_commands(page))]
            totals = [total + value for total, value in zip(totals, row, strict=True)]
            if any(row):
                print(f"{page.name:40} {row[0]:10} {row[1]:12} {row[2]:12} {row[3]:12}")
        print(f"{'all':40} {totals[0]:10} {totals[1]:12} {totals[2]:12} {totals[3]:12}")
        return 0
    failures = 0
    with Session() as session:
        for page in pages:
            start = time.monotonic()
            result = session.run(page)
            for line, text in result.outputs.items():
                print(f"--- {page.name}:{line}\n{text}", end="")
            failures += bool(result.failure)
            print(f"=== {page.name}: {result.failure or 'passed'} ({time.monotonic() - start:.1f} s)", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
