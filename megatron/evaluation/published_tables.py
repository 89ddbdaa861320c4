"""Result tables in the format of the papers' tables, with the published scores next to ours (`benchmarks/published`).

A column is a task at a budget: `based_fda_twice@1000`, `based_fda@full` (no truncation, or to 2,000 tokens or more),
or just `piqa`. Only scores of one column are comparable, and only if data, metric and harness version agree; each
published row names its source.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.errors import DataError
from megatron.files import read_json, write_text
from megatron.observe.figure import new_figure, save_figure

# MetaLA's paper: acc_norm for HellaSwag, ARC-c and OBQA, F1 for CB, accuracy elsewhere; recall tasks: contains
_METRICS = ("contains", "acc", "exact_match", "f1", "word_perplexity", "perplexity")
_SPECIAL = {"hellaswag": "acc_norm", "arc_challenge": "acc_norm", "openbookqa": "acc_norm", "cb": "f1"}
_SHARES = {"contains", "acc", "acc_norm", "exact_match", "f1"}
_FULL = 2000


@dataclass
class Row:
    """One row of a table.

    Attributes:
        name: the model.
        source: paper and table; empty for our results.
        cells: column -> value (in percent for rates).
        limited: column -> number of examples, such as `100 of 1838`, for scores of a subset.
    """

    name: str
    source: str = ""
    cells: dict[str, float] = field(default_factory=dict)
    limited: dict[str, str] = field(default_factory=dict)

    def take(self, column: str, value: float, subset: str | None) -> None:
        """Store a score, replacing an earlier one; a score of a subset does not replace one of all examples."""
        if subset is not None and column in self.cells and column not in self.limited:
            return
        self.cells[column] = value
        self.limited.pop(column, None)
        if subset is not None:
            self.limited[column] = subset

    def average(self, columns: Sequence[str]) -> float | None:
        """Mean over the columns, None if one is missing."""
        values = [self.cells.get(column) for column in columns]
        return sum(v for v in values if v is not None) / len(values) if values and None not in values else None


def column_of(task: str, context: int | None) -> str:
    """The column of a task; only recall tasks have a budget."""
    if not task.startswith("based_"):
        return task
    return f"{task}@{'full' if not context or context >= _FULL else context}"


def headline(task: str, values: Mapping[str, Any]) -> float | None:
    """The score that papers report for a task, rates in percent; None if the results lack it."""
    scores = {key.split(",")[0]: value for key, value in values.items() if isinstance(value, (int, float))}
    for metric in (_SPECIAL.get(task, _METRICS[0]), *_METRICS):
        if metric in scores:
            return 100.0 * scores[metric] if metric in _SHARES else float(scores[metric])
    return None


def read_results(paths: Iterable[Path]) -> list[Row]:
    """Our rows, from result files or folders of `eval.py` and of the `lm_eval` command.

    Raises:
        DataError: a path has no result.
    """
    rows: dict[str, Row] = {}
    for path in paths:
        files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        contents = [content for file in files if (content := _content(file)) is not None]
        if not contents:
            raise DataError("there are no results of lm-eval", where=str(path))
        for name, context, data in contents:
            row = rows.setdefault(name, Row(name))
            for task, values in data["results"].items():
                value = headline(task, values)
                if value is not None:
                    row.take(column_of(task, context), value, part_of(data, task))
    return list(rows.values())


def part_of(data: Mapping[str, Any], task: str) -> str | None:
    """The subset that `--limit` selected, such as `100 of 1838`; None if all examples count (recall tasks skip some by rule).

    Args:
        data: content of a result file of ours (`limit`, or inside `settings`) or of the `lm_eval` command (inside `config`).
        task: name of the task.
    """
    sections = [data, data.get("settings"), data.get("config")]
    limit = next((d["limit"] for d in sections if isinstance(d, dict) and d.get("limit") is not None), None)
    if limit is None:
        return None
    counted = (data.get("n-samples") or {}).get(task) or {}
    effective, original = counted.get("effective"), counted.get("original")
    if not original:
        return f"limit {limit}"
    return None if effective == original else f"{effective} of {original}"


def _content(file: Path) -> tuple[str, int | None, Mapping[str, Any]] | None:
    """(model, context_length, content) of a result file; None for other files."""
    try:
        data = read_json(file)
    except (OSError, ValueError):
        return None
    if not isinstance(data, dict) or not isinstance(data.get("results"), dict):
        return None
    if "lm_eval" in data:
        return str(data.get("model")), data.get("context_length"), data
    model_args = (data.get("config") or {}).get("model_args") or {}
    name = data.get("model_name") or (model_args.get("pretrained") if isinstance(model_args, dict) else model_args) or file.stem
    settings: list[Mapping[str, Any]] = [c.get("metadata") or {} for c in (data.get("configs") or {}).values()]
    context = next((int(s["context_length"]) for s in settings if "context_length" in s), 1000)
    return Path(str(name)).name, context, data


def read_published(file: Path) -> dict[str, list[Row]]:
    """Table -> its rows, in the order of the file."""
    tables: dict[str, dict[str, Row]] = {}
    with open(file, encoding="utf-8", newline="") as handle:
        for line in csv.DictReader(handle):
            name = f"{line['model']} {line['parameters']}/{line['tokens']}"
            row = tables.setdefault(line["table"], {}).setdefault(name, Row(name, line["source"]))
            row.cells[line["column"]] = float(line["value"])
    return {table: list(rows.values()) for table, rows in tables.items()}


def columns_of(rows: Iterable[Row]) -> list[str]:
    """All columns, in order of appearance."""
    return list(dict.fromkeys(column for row in rows for column in row.cells))


def cells(rows: Sequence[Row], columns: Sequence[str], averages: bool = True) -> list[list[str]]:
    """The table as text, heading first, with an average if no column is missing, separately for prompts read twice.

    A score of a subset of the examples, and an average that includes one, is marked with `*`.
    """
    twice = [column for column in columns if "_twice" in column]
    groups = {"average": [column for column in columns if column not in twice], "average twice": twice}
    groups = {name: members for name, members in groups.items() if members and averages}
    lines = [["model", *columns, *groups, "source"]]
    for row in rows:
        scores = [(row.cells.get(column), column in row.limited) for column in columns]
        scores += [(row.average(members), any(m in row.limited for m in members)) for members in groups.values()]
        texts = ["" if value is None else f"{value:.2f}{'*' * is_subset}" for value, is_subset in scores]
        lines.append([row.name, *texts, row.source or "ours"])
    return lines


def footnotes(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """Footnotes for the asterisks of a table: `* tiny: piqa on 100 of 1838 examples`."""
    notes = []
    for row in rows:
        parts = [f"{column} on {row.limited[column]}" for column in columns if column in row.limited]
        if parts:
            notes.append(f"* {row.name}: {', '.join(parts)} examples; not comparable with full results")
    return notes


def write_tables(rows: Sequence[Row], columns: Sequence[str], stem: Path, title: str, averages: bool = True) -> list[Path]:
    """Write `stem`.md, .csv and .png; `averages` makes sense if all columns are rates.

    Raises:
        DataError: matplotlib is not installed.
    """
    lines = cells(rows, columns, averages)
    table = [lines[0], ["---", *["---:"] * (len(lines[0]) - 2), "---"], *lines[1:]]
    notes = footnotes(rows, columns)
    markdown = [f"# {title}", "", *(f"| {' | '.join(line)} |" for line in table), ""]
    markdown += [line for note in notes for line in (note.replace("*", "\\*", 1), "")]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    paths = [stem.with_name(f"{stem.name}{ending}") for ending in (".md", ".csv", ".png")]
    write_text(paths[0], "\n".join(markdown))
    write_text(paths[1], text.getvalue())
    draw(lines, sum(not row.source for row in rows), paths[2], title, notes)
    return paths


def draw(lines: Sequence[Sequence[str]], ours: int, image: Path, title: str, notes: Sequence[str] = ()) -> None:
    """Draw the table as PNG: columns shaded from the lowest to the highest value, our rows (the first) in bold."""
    body = [line[:-1] for line in lines[1:]]
    heads = [word.replace("based_", "").replace("_twice", "\ntwice").replace("@", "\n@") for word in lines[0][:-1]]
    figure = new_figure(2.6 + 0.95 * len(heads), 0.8 + 0.2 * len(lines), missing="no picture")
    axes = figure.subplots()
    axes.axis("off")
    axes.set_title(title, fontsize=10)
    shades = [[(1.0, 1.0, 1.0), *(_shade(body, i, j) for j in range(1, len(heads)))] for i in range(len(body))]
    widths = [0.24, *[0.76 / (len(heads) - 1)] * (len(heads) - 1)]
    table = axes.table(body, cellColours=shades, colLabels=heads, colWidths=widths, loc="upper center", cellLoc="center")
    table.auto_set_font_size(False)
    table.set_fontsize(7.5)
    for (i, j), cell in table.get_celld().items():
        cell.set_edgecolor("#d9d9d9")
        if i == 0:
            cell.set_height(cell.get_height() * 2.2)
        if j == 0 and i:
            cell.get_text().set_horizontalalignment("left")
        if i == 0 or i <= ours:
            cell.get_text().set_fontweight("bold")
    if notes:
        figure.supxlabel("\n".join(notes), fontsize=7, x=0.01, ha="left")
    save_figure(figure, image, dpi=140, bbox_inches="tight")


def _shade(body: Sequence[Sequence[str]], i: int, j: int) -> tuple[float, float, float]:
    """White for the lowest value of a column, blue for its highest."""
    values = [float(line[j].rstrip("*")) for line in body if line[j]]
    if not body[i][j] or max(values) == min(values):
        return (1.0, 1.0, 1.0)
    share = (float(body[i][j].rstrip("*")) - min(values)) / (max(values) - min(values))
    return (1 - 0.45 * share, 1 - 0.25 * share, 1.0)
