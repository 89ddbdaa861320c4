"""Every page: its marked blocks run, their shown output is what they print, and every command of ours names what exists."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, page_paths, read_page
from tests.docs.command_lines import problems_of
from tests.docs.session import Session

PAGES = page_paths()


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session() as running:
        yield running


def _problems(paths: list[Path]) -> list[list[str]]:
    return [problems_of(read_page(path)) for path in paths]


@pytest.fixture(scope="module")
def problems() -> dict[Path, list[str]]:
    """Of all pages, from a process of its own: a script that is parsed may set variables that other tests must not see, as the
    one that compiles kernels turns Triton's interpreter off."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as pool:
        return dict(zip(PAGES, pool.submit(_problems, PAGES).result(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_commands_exist(path: Path, problems: dict[Path, list[str]]) -> None:
    assert not problems[path], "\n".join(problems[path])


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in PAGES if read_page(path).running], ids=_name)
def test_blocks_run(path: Path, session: Session) -> None:
    result = session.run(read_page(path))
    assert not result.failure, result.failure
