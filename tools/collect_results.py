"""Results of `launch_eval.py`, `eval.py` and the `lm_eval` command as Markdown, CSV and PNG, published figures beside them.

    python tools/collect_results.py runs/eval --output runs/eval/table [--table jrt-1]

Without `--table` there is one table of all that was measured, and one per published table (`benchmarks/published/scores.csv`)
that shares a column with it. `--table NAME` makes that one alone, also without any results of ours. Figures of a part of the
examples (`--limit`) carry a star.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.errors import ConfigError, exit_on_error
from megatron.evaluation.published_tables import Row, columns_of, footnotes, read_published, read_results, write_tables

PUBLISHED = Path(__file__).resolve().parents[1] / "benchmarks" / "published" / "scores.csv"


def chosen(rows: list[Row], published: dict[str, list[Row]], table: str | None) -> dict[str, tuple[list[Row], list[str]]]:
    """Table name -> (rows, columns) of what is to be written."""
    if table is not None and table not in published:
        raise ConfigError(f"there is no published table '{table}'", hint=f"one of {', '.join(published)}")
    have, found = columns_of(rows), {}
    if table is None and rows:
        found["all"] = (rows, have)
    for name, others in published.items():
        columns = columns_of(others)
        shared = [row for row in rows if set(row.cells) & set(columns)]
        if name == table or (table is None and shared):
            found[name] = (shared + others, columns)
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="result files, or folders of them")
    parser.add_argument("--output", type=Path, default=Path("runs/eval/table"), help="beginning of the files' names")
    parser.add_argument("--table", help="make this published table alone")
    with exit_on_error():
        arguments = parser.parse_args()
        if not arguments.results and arguments.table is None:
            raise ConfigError("name results, or a --table of published figures")
        rows = read_results(arguments.results)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        for name, (lines, columns) in chosen(rows, read_published(PUBLISHED), arguments.table).items():
            stem = arguments.output.with_name(f"{arguments.output.name}-{name}")
            title = "all results" if name == "all" else f"{lines[-1].source}, and ours"
            for path in write_tables(lines, columns, stem, title, averages=name != "all"):
                print(f"wrote {path}")
        for note in footnotes(rows, columns_of(rows)):
            print(note)


if __name__ == "__main__":
    main()
