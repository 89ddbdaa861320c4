"""One of the two hundred trials of `endings.py`: the launcher is killed, its ranks end, the same command finishes with 0."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.endings import one


@pytest.mark.slow
def test_a_run_whose_launcher_was_killed_goes_on_at_once(tmp_path: Path) -> None:
    ending = one("deepy resumed", tmp_path / "trial")
    assert ending.code == 0, ending.words
    assert ending.ranks_outlived_s < 5, "five were still training 8 s later"
    assert not (tmp_path / "trial" / "save" / "run.lock").exists()
