"""Every mutation of the table can still be made, names tests that exist, and a mistake is told from none on a small tree."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.mutation.runner import try_mutation
from tests.mutation.table import Mutation, NoMatch, mismatches, read_table

AREAS = {"settings", "data_pipeline", "assembly", "configuration", "engine", "memory", "partition", "cost", "initialisation"}
AREAS |= {"checkpoint", "evaluation", "training"}


def test_every_mutation_matches_its_file_exactly_once() -> None:
    assert mismatches(read_table()) == []


def test_the_table_is_large_and_covers_every_area() -> None:
    table = read_table()
    areas = Counter(mutation.area for mutation in table)
    assert len(table) >= 120 and set(areas) == AREAS and min(areas.values()) >= 4
    assert len({(m.file, m.old, m.new) for m in table}) == len(table)


@pytest.mark.slow
def test_a_mistake_is_caught_and_the_copy_is_as_before(tmp_path: Path) -> None:
    (tmp_path / "half.py").write_text("def half(x):\n    return x / 2\n")
    (tmp_path / "test_half.py").write_text("from half import half\n\n\ndef test_half():\n    assert half(4) == 2\n")
    wrong = Mutation("a", "half.py", "x / 2", "x / 3", ("test_half.py",))
    same = Mutation("a", "half.py", "x / 2", "x * 0.5", ("test_half.py",))
    endless = Mutation("a", "half.py", "return x / 2", "while True: pass", ("test_half.py",))
    assert [try_mutation(tmp_path, m, 60.0)[0] for m in (wrong, same)] == ["caught", "survived"]
    assert try_mutation(tmp_path, endless, 2.0)[0] == "timeout"
    assert "x / 2" in (tmp_path / "half.py").read_text()
    with pytest.raises(NoMatch, match="0 times"):
        Mutation("a", "half.py", "x / 4", "x", ("test_half.py",)).applied(tmp_path)
    assert len(mismatches([Mutation("a", "half.py", "return", "yield", ("test_half.py::test_other", "no.py"))], tmp_path)) == 2
