"""Every page: its marked blocks run, their shown output is what they print, and every command of ours names what exists."""

from __future__ import annotations

from collections.abc import Iterator
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


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_commands_exist(path: Path) -> None:
    assert not (problems := problems_of(read_page(path))), "\n".join(problems)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in PAGES if read_page(path).running], ids=_name)
def test_blocks_run(path: Path, session: Session) -> None:
    result = session.run(read_page(path))
    assert not result.failure, result.failure
