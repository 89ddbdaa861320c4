"""Runs the marked blocks of pages: a bash script per page, in a copy of the checkout, with a preloaded `python` on its PATH.

Line N of the script is line N of the page, so that bash's own messages name the page's lines.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

from tests.docs.blocks import ROOT, Block, Page, read_page

_PAGE_SECONDS, _START_SECONDS = 300, 120
_CORPUS = Path("data/pystdlib")
_END_OF_PYTHON = "END_OF_THE_PYTHON_BLOCK"
_PASSED_ON = ("LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE")
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:[eE][+-]?\d+)?[KMGT]?")


@dataclass(frozen=True)
class Result:
    """What a page did.

    Attributes:
        failure: where and why it failed; empty if it passed. outputs: line of a block -> what it printed.
        folder: the working folder that it left.
    """

    failure: str
    outputs: Mapping[int, str]
    folder: Path


class Session:
    """The preloaded process and the folders of the pages that ran; a page that others continue runs once."""

    def __init__(self) -> None:
        self._results: dict[Path, Result] = {}

    def __enter__(self) -> Session:
        self._scratch = TemporaryDirectory(prefix="docs-")
        self._root = Path(self._scratch.name)
        self._commands = self._root / "bin"
        self._commands.mkdir()
        shim = (Path(__file__).parent / "python_shim.py").read_text(encoding="utf-8")
        for name in ("python", "python3", "linear-neox", "torchrun"):
            (self._commands / name).write_text(f"#!{sys.executable} -IS\n{shim}", encoding="utf-8")
            (self._commands / name).chmod(0o755)
        self._environment = self._make_environment()
        command = [sys.executable, "-m", "tests.docs.preloaded", self._environment["DOCS_SOCKET"]]
        with open(self._root / "preloaded.log", "wb") as log:
            self._preloaded = subprocess.Popen(
                command, cwd=ROOT, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._preloaded.terminate()
        self._preloaded.wait()
        self._scratch.cleanup()

    def _make_environment(self) -> dict[str, str]:
        """The variables of the pages' shells; HOME and caches are the session's own, devices are hidden."""
        home = self._root / "home"
        home.mkdir()
        inherited = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        search = [str(self._commands), str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
        own = {"PATH": os.pathsep.join(search), "HOME": str(home), "DOCS_SOCKET": str(self._root / "socket")}
        own |= {"DOCS_PYTHON": str(self._commands / "python"), "DOCS_ROOT": str(ROOT)}
        own |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        return inherited | own | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120", "MPLBACKEND": "Agg"}

    def run(self, page: Page) -> Result:
        """Run a page, after the page that it continues; once for each path."""
        if page.path not in self._results:
            before = self.run(read_page(page.after)) if page.after else None
            folder = self._root / f"page{len(self._results)}" / "linear-neox"
            if before and before.failure:
                self._results[page.path] = Result(f"{page.name} continues a page that fails: {before.failure}", {}, folder)
            else:
                copy_checkout(folder) if before is None else shutil.copytree(before.folder, folder, symlinks=True)
                if before is None and (corpus := self._prepared_corpus()):  # twelve seconds of CPU for each page otherwise
                    shutil.copytree(corpus, folder / _CORPUS)
                self._results[page.path] = self._run(page, folder)
        return self._results[page.path]

    def _prepared_corpus(self) -> Path | None:
        """The corpus that a page has prepared, complete; its command then finds nothing to do on the others."""
        folders = (result.folder / _CORPUS for result in self._results.values() if not result.failure)
        return next((folder for folder in folders if folder.is_dir()), None)

    def _await_preloaded(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not (self._root / "socket").exists():
            if self._preloaded.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self._root / "preloaded.log").read_text(encoding="utf-8", errors="replace"))
            time.sleep(0.05)

    def _run(self, page: Page, folder: Path) -> Result:
        self._await_preloaded()
        logs = folder.parent / "logs"
        logs.mkdir()
        script = folder.parent / page.path.name  # bash names it in its messages
        script.write_text("\n".join(script_lines(page)) + "\n", encoding="utf-8")
        environment = {**self._environment, "DOCS_FOLDER": str(folder), "DOCS_LOGS": str(logs)}
        with open(logs / "rest", "wb") as rest:
            shell = subprocess.Popen(
                ["bash", str(script)],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=rest,
                stderr=rest,
                start_new_session=True,
            )
            try:
                code: int | None = shell.wait(_PAGE_SECONDS)
            except subprocess.TimeoutExpired:
                code = None
            finally:  # also what the page has left in the background
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(shell.pid, signal.SIGKILL)
                shell.wait()
        outputs = {
            block.line: (logs / str(block.line)).read_text(encoding="utf-8", errors="replace")
            for block in page.running
            if (logs / str(block.line)).exists()
        }
        if code:
            failure = _failed_command(page, logs, code, outputs)
        else:
            failure = (
                f"{page.name} runs longer than {_PAGE_SECONDS} s" if code is None else "\n".join(missing_output(page, outputs))
            )
        return Result(failure, outputs, folder)


def copy_checkout(folder: Path) -> None:
    """Copy all files that git knows or would add, with their times; without git, all but hidden folders and results."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=False
    )
    names = listing.stdout.decode().split("\0") if listing.returncode == 0 else _files_without_git()
    folder.mkdir(parents=True)
    for name in names:
        if name and (ROOT / name).is_file() and not name.startswith("tests/golden/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def _files_without_git() -> Iterator[str]:
    for parent, folders, files in os.walk(ROOT):
        top = parent == str(ROOT)
        folders[:] = [f for f in folders if not f.startswith((".", "__pycache__")) and not (top and f in ("data", "runs"))]
        yield from (os.path.relpath(os.path.join(parent, name), ROOT) for name in files)


def script_lines(page: Page) -> list[str]:
    """The bash script of a page: marked blocks on their own lines, all other lines empty."""
    lines = [""] * (page.length + 1)
    lines[0] = 'set -Eeuo pipefail; trap \'echo "$LINENO" >"$DOCS_LOGS/failed"\' ERR; export DOCS_SETTINGS'
    for line, command in page.setup:
        lines[line - 1] = command
    for block in page.running:
        start = f'exec >"$DOCS_LOGS/{block.line}" 2>&1; DOCS_SETTINGS={_quoted(json.dumps(block.settings))}'
        inner = list(block.lines)
        if block.language == "python":
            start += f"; python - <<'{_END_OF_PYTHON}'"
            inner.append(_END_OF_PYTHON)
        lines[block.line - 1] = f"{lines[block.line - 1]}; {start}" if block.line == 1 else start
        lines[block.line : block.line + len(inner)] = inner
    return lines


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _failed_command(page: Page, logs: Path, code: int, outputs: Mapping[int, str]) -> str:
    failed = logs / "failed"
    started = max(outputs, default=1)
    printed = outputs.get(started, "") + (logs / "rest").read_text(errors="replace")
    named = re.findall(
        rf"{re.escape(page.path.name)}: line (\d+):", printed
    )  # an unset variable or a syntax error traps nothing
    line = int(failed.read_text().split()[0]) if failed.exists() else int(named[-1]) if named else started
    text = page.path.read_text(encoding="utf-8").splitlines()[line - 1].strip()
    tail = "\n".join(printed.splitlines()[-25:])
    return f"{page.name}:{line}: exit code {code}: {text}\n{tail}"


def missing_output(page: Page, outputs: Mapping[int, str]) -> Iterator[str]:
    """Say which lines of expected output a page's blocks did not print."""
    previous: Block | None = None
    for block in page.blocks:
        if block.runs:
            previous = block
        elif block.output and previous is not None:
            printed = [_squeezed(line) for line in outputs.get(previous.line, "").splitlines()]
            for offset, line in enumerate(block.lines, 1):
                at = _first_match(_pattern(line, block.any_numbers), printed)
                if at is None:
                    text = "\n".join(outputs.get(previous.line, "").splitlines()[-40:])
                    yield f"{page.name}:{block.line + offset}: no line of the block before is '{line.strip()}':\n{text}"
                    break
                del printed[: at if line.strip() in ("", "...") else at + 1]


def _squeezed(line: str) -> str:
    return " ".join(line.split())


def _pattern(line: str, any_numbers: bool) -> re.Pattern[str]:
    """What a printed line must match: `...` is any text, spaces are equal, numbers may be any."""
    pieces = []
    for piece in _squeezed(line).split("..."):
        texts = _NUMBER.split(piece) if any_numbers else [piece]
        pieces.append(_NUMBER.pattern.join(map(re.escape, texts)))
    return re.compile(".*".join(pieces))


def _first_match(pattern: re.Pattern[str], printed: Sequence[str]) -> int | None:
    if pattern.pattern == "":
        return 0
    return next((index for index, line in enumerate(printed) if pattern.fullmatch(line)), None)
