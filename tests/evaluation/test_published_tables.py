"""Tables of results: what is read, which figure of a task counts, columns, averages, files; the published figures."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from megatron.errors import DataError
from megatron.evaluation.published_tables import (
    Row,
    cells,
    column_of,
    columns_of,
    footnotes,
    headline,
    part_of,
    read_published,
    read_results,
)
from tests.commands import run_here

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "benchmarks" / "published" / "scores.csv"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two files of ours and one of the `lm_eval` command."""
    folder = tmp_path / "eval"
    folder.mkdir()
    scores = {"hellaswag": {"alias": "hellaswag", "acc,none": 0.25, "acc_norm,none": 0.3, "acc_norm_stderr,none": 0.1}}
    ours = {"lm_eval": "0.4.13", "model": "tiny", "context_length": 1000, "results": scores}
    (folder / "a.json").write_text(json.dumps(ours))
    recall = {"based_fda": {"contains,none": 0.5}, "swde_verbatim": {"contains,none": 0.125}}
    (folder / "b.json").write_text(json.dumps(ours | {"results": recall}))
    stock = {"config": {"model_args": {"pretrained": "/x/hf-tiny"}}, "results": {"based_fda_twice": {"contains,none": 0.75}}}
    stock["configs"] = {"based_fda_twice": {"metadata": {"context_length": 512}}}
    (folder / "results_2026.json").write_text(json.dumps(stock))
    (folder / "notes.json").write_text("[1]")
    return folder


def test_reading(results: Path) -> None:
    first, second = read_results([results])
    assert (first.name, first.cells) == ("tiny", {"hellaswag": 30.0, "based_fda@1000": 50.0, "swde_verbatim": 12.5})
    assert (second.name, second.cells) == ("hf-tiny", {"based_fda_twice@512": 75.0})
    with pytest.raises(DataError, match="no results"):
        read_results([results / "notes.json"])


def test_figures_and_columns() -> None:
    assert headline("cb", {"acc,none": 0.5, "f1,none": 0.25}) == 25.0 and headline("piqa", {"acc,none": 0.5}) == 50.0
    assert headline("wikitext", {"word_perplexity,none": 12.5, "alias": "w"}) == 12.5
    assert headline("bleu", {"bleu,none": 3.0}) is None
    assert [column_of("based_fda", n) for n in (0, 512, 2000, None)] == [
        f"based_fda@{n}" for n in ("full", 512, "full", "full")
    ]
    assert column_of("piqa", 1000) == "piqa"


def test_averages_stand_where_nothing_is_missing() -> None:
    rows = [Row("a", "", {"x": 1.0, "y": 3.0, "x_twice@9": 7.0}), Row("b", "paper", {"x": 1.0, "x_twice@9": 5.0})]
    assert cells(rows, columns_of(rows)) == [
        ["model", "x", "y", "x_twice@9", "average", "average twice", "source"],
        ["a", "1.00", "3.00", "7.00", "2.00", "7.00", "ours"],
        ["b", "1.00", "", "5.00", "", "5.00", "paper"],
    ]
    assert cells(rows[:1], ["x"], averages=False) == [["model", "x", "source"], ["a", "1.00", "ours"]]


@pytest.mark.parametrize(
    ("facts", "part"),
    [
        ({"limit": 100}, "100 of 1838"),
        ({"settings": {"limit": 100}}, "100 of 1838"),
        ({"config": {"limit": 100.0}}, "100 of 1838"),
        ({"limit": None, "settings": {"limit": None}}, None),
        ({}, None),
    ],
)
def test_limited_figures_are_known_in_every_kind_of_file(facts: dict[str, Any], part: str | None) -> None:
    counted = {"n-samples": {"piqa": {"effective": 100, "original": 1838}}}
    assert part_of({**facts, **counted}, "piqa") == part
    assert part_of({"limit": 5000, "n-samples": {"piqa": {"effective": 1838, "original": 1838}}}, "piqa") is None
    assert part_of({"limit": 7}, "piqa") == "limit 7"


def test_limited_figures_are_marked_with_their_averages() -> None:
    row = Row("a", "", {"x": 1.0, "y_twice@9": 7.0}, {"x": "2 of 9"})
    assert cells([row], columns_of([row]))[1] == ["a", "1.00*", "7.00", "1.00*", "7.00", "ours"]
    assert footnotes([row], ["x", "y_twice@9"]) == ["* a: x on 2 of 9 examples; not comparable with whole figures"]


def test_a_whole_figure_beats_a_limited_one_in_any_order() -> None:
    for order in ((None, "2 of 9"), ("2 of 9", None)):
        row = Row("a")
        for part in order:
            row.take("x", 1.0 if part is None else 2.0, part)
        assert (row.cells, row.limited) == ({"x": 1.0}, {})
    row.take("y", 3.0, "limit 1")
    row.take("y", 4.0, "limit 2")
    assert (row.cells["y"], row.limited) == (4.0, {"y": "limit 2"})


def test_published_averages_are_those_that_the_papers_print() -> None:
    """JRT Table 1 prints 42.5 and 51.1 for its first row, MetaLA's tables 49.22, 49.99 and 55.52 for its own last ones."""
    tables = read_published(PUBLISHED)
    lines = {row[0]: row for row in cells(tables["jrt-1"], columns_of(tables["jrt-1"]))}
    first = lines["Transformer++ 1.3B/10B"]
    assert float(first[-3]) == pytest.approx(42.5, abs=0.05) and float(first[-2]) == pytest.approx(51.1, abs=0.05)
    for table, name, printed in (
        ("superglue", "MetaLA b 1.4B/300B", 49.22),
        ("commonsense", "MetaLA b 1.4B/300B", 49.99),
        ("scale", "MetaLA 3.0B/300B", 55.52),
        ("jrt-2", "JRT-RNN 1.3B/50B", 49.5),
    ):
        row = next(row for row in tables[table] if row.name == name)
        assert row.average(columns_of(tables[table])) == pytest.approx(printed, abs=0.06), table
    assert len(tables["based"]) == 6 and all(row.source for rows in tables.values() for row in rows)


@pytest.mark.slow
def test_the_command_marks_limited_figures(results: Path, tmp_path: Path) -> None:
    content = json.loads((results / "a.json").read_text())
    content |= {"limit": 10, "n-samples": {"hellaswag": {"original": 10042, "effective": 10}}}
    (results / "a.json").write_text(json.dumps(content))
    done = run_here("tools/collect_results.py", results, "--output", tmp_path / "t")
    assert done.returncode == 0, done.stderr
    assert "* tiny: hellaswag on 10 of 10042 examples" in done.stdout
    text = (tmp_path / "t-all.md").read_text()
    assert "| 30.00* |" in text and "\\* tiny: hellaswag on 10 of 10042 examples" in text
    assert "30.00*" in (tmp_path / "t-all.csv").read_text()


@pytest.mark.slow
def test_command(results: Path, tmp_path: Path) -> None:
    done = run_here("tools/collect_results.py", results, "--output", tmp_path / "out" / "t")
    assert done.returncode == 0, done.stderr
    made = {path.name for path in (tmp_path / "out").iterdir()}
    tables = ("all", "jrt-1", "based", "commonsense", "scale")
    assert made == {f"t-{name}.{ending}" for name in tables for ending in ("md", "csv", "png")}
    lines = list(csv.reader((tmp_path / "out" / "t-jrt-1.csv").open()))
    assert lines[1][:2] == ["tiny", "50.00"] and lines[1][-1] == "ours" and lines[2][0] == "Transformer++ 1.3B/10B"
    assert "| tiny | 50.00 |" in (tmp_path / "out" / "t-jrt-1.md").read_text()
    bad = run_here("tools/collect_results.py", "--table", "jrt-9")
    assert bad.returncode == 2 and "one of jrt-1" in bad.stderr and "Traceback" not in bad.stderr
