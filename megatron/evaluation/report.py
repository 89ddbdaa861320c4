"""Reports of an evaluation: a table for the console, plots (PNG) over the evaluation length, and the needle heat map."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.observe.figure import new_figure, save_figure

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


def token_ticks(axes: Any, lengths: Iterable[int]) -> None:
    """A logarithmic x axis of tokens with a label for each length and no others."""
    ticks = sorted(set(lengths))
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.xaxis.minorticks_off()


def plot_lengths(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], image: str | Path, title: str = "", trained: int | None = None
) -> Path:
    """Plot perplexity over the evaluation length, one line per name, on log axes; marks the length `trained`.

    Raises:
        DataError: matplotlib is not installed.
    """
    figure = new_figure(7.5, 5)
    from matplotlib.ticker import LogLocator

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
    axes.set(yscale="log", xlabel="evaluation length (tokens)", ylabel="perplexity", title=title)
    token_ticks(axes, lengths)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.minorticks_off()
    axes.grid(True, which="both", color="#e6e6e6", linewidth=0.7)
    axes.legend()
    return save_figure(figure, image)


def plot_positions(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], image: str | Path, title: str = "", trained: int | None = None
) -> Path:
    """Plot the loss of each position bucket over its end, one line per name; marks the length `trained`.

    Raises:
        DataError: matplotlib is not installed.
    """
    figure = new_figure(7.5, 5)
    axes = figure.subplots()
    for number, (name, rows) in enumerate(curves.items()):
        colour, mark = _COLOURS[number % len(_COLOURS)], _MARKS[number % len(_MARKS)]
        axes.plot([row["length"] for row in rows], [row["loss"] for row in rows], color=colour, marker=mark, label=name)
    if trained:
        axes.axvline(trained, color="#969696", linewidth=1, linestyle=":")
    axes.set(xlabel="end of the position bucket (tokens)", ylabel="loss (nats per token)", title=title)
    token_ticks(axes, {row["length"] for rows in curves.values() for row in rows})
    axes.grid(True, color="#e6e6e6", linewidth=0.7)
    axes.legend()
    return save_figure(figure, image)


def plot_ladder(
    models: Mapping[str, Sequence[Mapping[str, Any]]],
    image: str | Path,
    title: str = "",
    published: Mapping[str, Mapping[int, float]] | None = None,
    metric: str = "accuracy",
) -> Path:
    """Heat maps of needle accuracy, length by depth, one per model and kind; below, published scores over the length.

    Args:
        models: name -> rows of a ladder.
        image: the PNG.
        title: of the figure.
        published: `model, task` -> length -> percent, scores of other people; drawn apart and labelled as published.
        metric: accuracy | exact | choice.

    Raises:
        DataError: matplotlib is not installed.
    """
    panels = [(name, task) for name, rows in models.items() for task in dict.fromkeys(row["task"] for row in rows)]
    across = min(3, max(1, len(panels)))
    down = -(-len(panels) // across)
    figure = new_figure(4.2 * across, 2.6 * down + (3.8 if published else 0.4))
    figure.suptitle(title, fontsize=11)
    grid = figure.add_gridspec(down + bool(published), across, height_ratios=[1.0] * down + [1.1] * bool(published))
    for number, (name, task) in enumerate(panels):
        rows = [row for row in models[name] if row["task"] == task and metric in row]
        _heat_map(figure.add_subplot(grid[number // across, number % across]), rows, f"ours: {name}, {task}", metric)
    if published:
        axes = figure.add_subplot(grid[down, :])
        for number, (name, scores) in enumerate(published.items()):
            colour, mark = _COLOURS[number % len(_COLOURS)], _MARKS[number // len(_COLOURS) % len(_MARKS)]
            axes.plot(list(scores), list(scores.values()), "--", color=colour, marker=mark, markersize=4, label=name)
        axes.set(ylim=(-3, 103), ylabel="percent", title="published, not measured here, and not the same needles")
        token_ticks(axes, {length for scores in published.values() for length in scores})
        axes.legend(fontsize=6, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    return save_figure(figure, image)


def _heat_map(axes: Any, rows: Sequence[Mapping[str, Any]], title: str, metric: str) -> None:
    """One panel: depths down, lengths across, percent in the cells."""
    lengths, depths = (sorted({row[key] for row in rows}) for key in ("length", "depth"))
    cells = {(row["depth"], row["length"]): 100 * row[metric] for row in rows}
    values = [[cells.get((depth, length), float("nan")) for length in lengths] for depth in depths]
    if rows:
        axes.imshow(values, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
    for (depth, length), value in cells.items():
        axes.text(lengths.index(length), depths.index(depth), f"{value:.0f}", ha="center", va="center", fontsize=7)
    axes.set_xticks(range(len(lengths)), [str(n) for n in lengths], fontsize=6)
    axes.set_yticks(range(len(depths)), [f"{d:g}" for d in depths], fontsize=7)
    axes.set_title(title, fontsize=8)
