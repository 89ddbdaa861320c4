"""Figures and a table from the results of `tools/synthetics.py`.

    python tools/figures_recall.py results.jsonl --output benchmarks/results/mqar-cpu

Writes `OUTPUT.md` (every model, its best learning rate, accuracy per slice) and, in the shapes of the papers' figures,
`OUTPUT-state.png`, accuracy over bytes of state (Based, Figure 2), and `OUTPUT-slices.png`: accuracy over width for each length
and number of pairs (MetaLA, Figure 3 and Table A7), or, for set disjointness, over bytes of state with the shorter and with the
longer set first (JRT, Figure 2).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.errors import DataError, exit_on_error
from megatron.files import write_text
from megatron.synthetics.sweep_results import read_lines

Row = Mapping[str, Any]
_MARKS = "osD^vP*X<>h"


def best_rates(lines: Sequence[Row]) -> list[Row]:
    """Of each model the line with the best learning rate, in the order of the file's families and of state."""
    best: dict[str, Row] = {}
    for line in lines:
        training = {k: v for k, v in line["training"].items() if k != "learning_rate"}
        group = json.dumps([line["name"], line["data"], line["model"], training], sort_keys=True)
        if group not in best or line["accuracy"] > best[group]["accuracy"]:
            best[group] = line
    families = list(dict.fromkeys(line["name"] for line in lines))
    return sorted(best.values(), key=lambda line: (families.index(line["name"]), line["state_bytes"]))


def slice_name(part: Row) -> str:
    """A test slice in few letters: what tells it from others of its task."""
    if "pairs" in part:
        return f"{part['length']} tokens, {part['pairs']} pairs"
    if "first" in part:
        return f"{part['first']}:{part['second']}"
    hidden = ("examples", "accuracy", "vocab_size", "power_a", "random_non_queries")
    return ", ".join(f"{name} {value}" for name, value in part.items() if name not in hidden)


def settings(line: Row) -> str:
    """What the grid varied but the rate."""
    return ", ".join(f"{name} {value}" for name, value in line["tags"].items() if name != "learning_rate") or "-"


def markdown(rows: Sequence[Row]) -> str:
    """One row per model."""
    names = [slice_name(part) for part in rows[0]["slices"]]
    head = ["family", "setting", "state bytes", "parameters", "best rate", "steps", *names, "mean"]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in rows:
        right = [f"{100 * part['accuracy']:.1f}" for part in line["slices"]]
        cells = [line["name"], settings(line), f"{line['state_bytes']:,}", f"{line['parameters']:,}"]
        cells += [f"{line['training']['learning_rate']:g}", str(line["steps"]), *right, f"{100 * line['accuracy']:.1f}"]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def _lines(axes: Any, rows: Sequence[Row], x: Callable[[Row], float], y: Callable[[Row], float]) -> None:
    """A line per family through the best value at each x."""
    for number, family in enumerate(dict.fromkeys(line["name"] for line in rows)):
        best: dict[float, float] = {}
        for line in rows:
            if line["name"] == family:
                best[x(line)] = max(best.get(x(line), 0.0), y(line))
        points = sorted(best.items())
        axes.plot(*zip(*points, strict=True), marker=_MARKS[number % len(_MARKS)], label=family, color=f"C{number % 10}")
    axes.set_ylim(-0.03, 1.03)
    axes.grid(alpha=0.3)


def _doubling(axes: Any) -> None:
    """An x axis on which each doubling is a step, with plain numbers."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _bytes(line: Row) -> float:
    return float(line["state_bytes"])


def _slice(name: str) -> Callable[[Row], float]:
    def accuracy(line: Row) -> float:
        return next(float(part["accuracy"]) for part in line["slices"] if slice_name(part) == name)

    return accuracy


def _side(longer_first: bool) -> Callable[[Row], float]:
    def accuracy(line: Row) -> float:
        found = [float(p["accuracy"]) for p in line["slices"] if p["first"] != p["second"]]
        sides = [p["first"] > p["second"] for p in line["slices"] if p["first"] != p["second"]]
        chosen = [a for a, side in zip(found, sides, strict=True) if side is longer_first]
        return sum(chosen) / len(chosen)

    return accuracy


def panels(rows: Sequence[Row]) -> tuple[list[tuple[str, Callable[[Row], float]]], Callable[[Row], float], str]:
    """Of the second figure: titles with what is drawn, the x axis, and its name."""
    parts = rows[0]["slices"]
    if "first" in parts[0]:
        sides = {part["first"] > part["second"] for part in parts if part["first"] != part["second"]}
        titles = {False: "shorter set first", True: "longer set first"}
        return [(titles[side], _side(side)) for side in sorted(sides)], _bytes, "state, bytes"
    drawn = [(slice_name(part), _slice(slice_name(part))) for part in parts]
    return drawn, lambda line: float(line["model"]["hidden_size"]), "width"


def draw(rows: Sequence[Row], output: Path, title: str) -> list[Path]:
    """Both figures; their paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    state, slices = (output.with_name(f"{output.name}-{kind}.png") for kind in ("state", "slices"))
    figure, axes = plt.subplots(figsize=(7, 4.5))
    _lines(axes, rows, _bytes, lambda line: float(line["accuracy"]))
    _doubling(axes)
    axes.set_xlabel("state per sequence, bytes (attention at the longest test length)")
    axes.set_ylabel("accuracy, mean over test slices")
    axes.set_title(title)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(state, dpi=140)
    plt.close(figure)
    drawn, x, name = panels(rows)
    figure, grid = plt.subplots(1, len(drawn), figsize=(1 + 3.2 * len(drawn), 3.8), sharey=True, squeeze=False)
    for axes, (heading, y) in zip(grid[0], drawn, strict=True):
        _lines(axes, rows, x, y)
        _doubling(axes)
        axes.set_xlabel(name)
        axes.set_title(heading, fontsize=10)
    grid[0][0].set_ylabel("accuracy")
    grid[0][-1].legend(fontsize=7)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(slices, dpi=140)
    plt.close(figure)
    return [state, slices]


def run(args: argparse.Namespace) -> None:
    """Write the table and the figures.

    Raises:
        DataError: there are no results, or they are of several tasks or test slices.
    """
    if not args.results.is_file():
        raise DataError("there are no results", where=str(args.results), hint="python tools/synthetics.py SWEEP.yml")
    lines = read_lines(args.results)
    if not lines:
        raise DataError("there are no results", where=str(args.results), why="the file has no whole line")
    tests = {json.dumps([slice_name(part) for part in line["slices"]]) for line in lines}
    if len(tests) != 1 or len({line["data"]["task"] for line in lines}) != 1:
        raise DataError("results of several tasks or test slices cannot be drawn together", where=str(args.results))
    rows, output = best_rates(lines), args.output or args.results.with_suffix("")
    output.parent.mkdir(parents=True, exist_ok=True)
    table = output.with_name(output.name + ".md")
    write_text(table, markdown(rows))
    print(markdown(rows), end="")
    for path in [table, *draw(rows, output, args.title or f"{lines[0]['data']['task']}, best of the learning rates")]:
        print(f"wrote {path}")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path, default=None, help="beginning of the names; default: beside the results")
    parser.add_argument("--title", default=None)
    with exit_on_error():
        args = parser.parse_args()
        run(args)


if __name__ == "__main__":
    main()
