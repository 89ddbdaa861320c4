"""Plots loss.png from metrics.jsonl: training and validation loss, and below them accuracy, learning rate and gradient norm.

Only logged metrics get a panel; curves with few points have markers, so that a single point is visible.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.errors import DataError
from megatron.observe.figure import new_figure, save_figure
from megatron.observe.jsonl import read_rows

_STEP, _MEAN, _SMOOTH, _VALID, _TEST, _RATE, _NORM = "#c6dbef", "#6baed6", "#08519c", "#d94801", "#7f2704", "#31a354", "#756bb1"
_FEW = 12  # points up to which each is marked


def series(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """(iterations, values) of one metric, without rows that lack it or hold null."""
    points = [(row["iteration"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    return [x for x, _ in points], [y for _, y in points]


def smooth(values: list[float], window: int) -> list[float]:
    """Running mean over the last `window` points (fewer at the start), which excludes later points."""
    windows = (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))
    return [sum(window_values) / len(window_values) for window_values in windows]


def plot_metrics(metrics_file: str | Path, image: str | Path, title: str = "") -> Path:
    """Draw `image` (PNG) from a metrics file.

    Raises:
        DataError: the file has no training loss, matplotlib is not installed, or the image cannot be written.
    """
    rows = read_rows(metrics_file)
    if not series(rows, "train/lm_loss")[0]:
        raise DataError("no plot: no training loss was logged", where=str(metrics_file))
    accuracy = any(series(rows, f"{split}/accuracy")[0] for split in ("validation", "test"))
    lines = [("train/learning_rate", _RATE, "learning rate"), ("train/grad_norm", _NORM, "gradient norm")]
    lines = [line for line in lines if series(rows, line[0])[0]]
    heights = [3.0, *([1.5] if accuracy else []), *(1.0 for _ in lines)]
    figure = new_figure(9, 1.2 + 1.25 * sum(heights))
    panels = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0])
    _draw_loss(panels[0], rows)
    if accuracy:
        _draw_accuracy(panels[1], rows)
    for axes, (name, color, label) in zip(panels[len(panels) - len(lines) :], lines, strict=True):
        _draw_line(axes, *series(rows, name), color, label)
    panels[-1].set_xlabel("iteration")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    if title:
        figure.suptitle(title, fontsize=12)
    try:
        return save_figure(figure, image)
    except OSError as error:
        raise DataError("no plot: it cannot be written", where=str(image), why=error.strerror) from error


def _style(axes: Any, label: str) -> None:
    axes.set_ylabel(label)
    axes.grid(True, color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _marks(values: list[float]) -> dict[str, Any]:
    """Markers for curves with few points: a line through one point is invisible."""
    return {"marker": "o", "markersize": 4} if len(values) <= _FEW else {}


def _draw_line(axes: Any, steps: list[int], values: list[float], color: str, label: str) -> None:
    axes.plot(steps, values, color=color, linewidth=1.3, **_marks(values))
    axes.set_ylim(bottom=0)
    _style(axes, label)


def _draw_loss(axes: Any, rows: list[dict[str, Any]]) -> None:
    """The losses of logged steps, the interval means if they differ, and a running mean."""
    steps, losses = series(rows, "train/lm_loss")
    axes.plot(steps, losses, color=_STEP, linewidth=1, label="training, logged step", **_marks(losses))
    mean_steps, means = series(rows, "train/lm_loss_mean")
    if means and (mean_steps, means) != (steps, losses):
        axes.plot(mean_steps, means, color=_MEAN, linewidth=1.2, label="training, mean of the interval", **_marks(means))
        steps, losses = mean_steps, means
    if len(losses) >= 20:
        window = max(5, len(losses) // 40)
        label = f"training, running mean of {window} points"
        axes.plot(steps, smooth(losses, window), color=_SMOOTH, linewidth=1.8, label=label)
    _draw_held_out(axes, rows, "lm_loss", ".3f")
    _style(axes, "loss (nats per token)")
    axes.legend(frameon=False)
    _token_axis(axes, rows)


def _draw_accuracy(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Accuracy of tasks with answers (synthetic data); such a task is learned at 1, whatever the loss."""
    _draw_held_out(axes, rows, "accuracy", ".1%")
    axes.set_ylim(-0.03, 1.08)
    _style(axes, "accuracy")
    axes.legend(frameon=False)


def _draw_held_out(axes: Any, rows: list[dict[str, Any]], metric: str, form: str) -> None:
    """Validation as a line with its last value, the final test as one point."""
    steps, values = series(rows, f"validation/{metric}")
    if values:
        axes.plot(steps, values, color=_VALID, linewidth=1.6, marker="o", markersize=4, label="validation")
        axes.annotate(
            format(values[-1], form), (steps[-1], values[-1]), xytext=(-4, 8), textcoords="offset points", color=_VALID
        )
    steps, values = series(rows, f"test/{metric}")
    if values:
        axes.plot(steps, values, color=_TEST, linestyle="none", marker="D", markersize=5, label="test")


def _token_axis(axes: Any, rows: list[dict[str, Any]]) -> None:
    """A second axis on top with the number of tokens, which is proportional to the steps."""
    steps, tokens = series(rows, "train/tokens")
    if not steps or not steps[-1]:
        return
    per_step = tokens[-1] / steps[-1]
    unit, name = next(((u, n) for u, n in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")) if tokens[-1] >= u), (1, ""))
    scale = per_step / unit
    top = axes.secondary_xaxis("top", functions=(lambda x: x * scale, lambda x: x / scale))
    top.set_xlabel(f"tokens ({name})" if name else "tokens")
