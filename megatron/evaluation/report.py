"""Reports of an evaluation: a table for the console, and a plot (PNG) over the evaluation length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.errors import DataError
from megatron.files import atomic_open

_COLOURS = ("#08519c", "#d94801", "#31a354", "#756bb1", "#636363", "#c51b8a")
_MARKS = ("o", "s", "^", "D", "v", "P")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with aligned columns; a row with an `error` shows it instead of numbers."""
    lines = [f"{'length':>8} {'stride':>7} {'passes':>8} {'perplexity':>11} {'per word':>10} {'bits/byte':>10} {'seconds':>8}"]
    for row in rows:
        head = f"{row['length']:>8} {row['stride']:>7}"
        if "error" in row:
            lines.append(f"{head}  {row['error']}")
            continue
        word, bits = row.get("word_perplexity"), row.get("bits_per_byte")
        shown = [f"{word:>10.3f}" if word else f"{'-':>10}", f"{bits:>10.4f}" if bits else f"{'-':>10}"]
        lines.append(f"{head} {row['passes']:>8} {row['perplexity']:>11.4f} {' '.join(shown)} {row['seconds']:>8.1f}")
    return "\n".join(lines)


def plot_lengths(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], image: str | Path, title: str = "", trained: int | None = None
) -> Path:
    """Plot perplexity over the evaluation length, one line per name, on log axes; marks the length `trained`.

    Raises:
        DataError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError as error:
        raise DataError("no plot: matplotlib is not installed", why=str(error), hint="pip install matplotlib") from error
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lengths: set[int] = set()
    for number, (name, rows) in enumerate(curves.items()):
        good = [row for row in rows if "error" not in row]
        lengths |= {row["length"] for row in good}
        colour, mark = _COLOURS[number % len(_COLOURS)], _MARKS[number % len(_MARKS)]
        style = "--" if "sliding" in name else "-"
        axes.plot([r["length"] for r in good], [r["perplexity"] for r in good], style, color=colour, marker=mark, label=name)
    if trained:
        axes.axvline(trained, color="#969696", linewidth=1, linestyle=":")
        axes.annotate("trained length", (trained, 1), (4, -4), xycoords=("data", "axes fraction"), textcoords="offset points",
                      va="top", fontsize=8, color="#636363")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="evaluation length (tokens)", ylabel="perplexity", title=title)
    axes.set_xticks(sorted(lengths), [str(n) for n in sorted(lengths)])
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.minorticks_off()
    axes.grid(True, which="both", color="#e6e6e6", linewidth=0.7)
    axes.legend()
    image = Path(image)
    with atomic_open(image) as handle:
        figure.savefig(handle, format="png", dpi=130)
    return image
