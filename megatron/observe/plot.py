"""loss.png from metrics.jsonl: training and validation loss, and below them learning rate and gradient norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.errors import DataError
from megatron.files import atomic_open
from megatron.observe.jsonl import read_rows

_TRAIN, _SMOOTH, _VALID, _RATE, _NORM = "#9ecae1", "#08519c", "#d94801", "#31a354", "#756bb1"


def series(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """(iterations, values) of one metric; rows without it, or with null, are left out."""
    points = [(row["iteration"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    return [x for x, _ in points], [y for _, y in points]


def smooth(values: list[float], window: int) -> list[float]:
    """Centred running mean over `window` points (fewer at the ends): it does not lag behind a falling loss."""
    half = window // 2
    parts = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in parts]


def plot_metrics(metrics_file: str | Path, image: str | Path, title: str = "") -> Path:
    """Draw `image` (PNG) from a metrics file.

    Raises:
        DataError: the file has no training loss, or matplotlib is not installed.
    """
    rows = read_rows(metrics_file)
    if not series(rows, "train/lm_loss")[0]:
        raise DataError("no plot: no training loss was logged", where=str(metrics_file))
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("no plot: matplotlib is not installed", why=str(error), hint="pip install matplotlib") from error
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    loss, rate, norm = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    _draw_loss(loss, rows)
    _draw_line(rate, *series(rows, "train/learning_rate"), _RATE, "learning rate")
    _draw_line(norm, *series(rows, "train/grad_norm"), _NORM, "gradient norm")
    norm.set_xlabel("iteration")
    if title:
        figure.suptitle(title, fontsize=12)
    image = Path(image)
    with atomic_open(image) as handle:
        figure.savefig(handle, format="png", dpi=130)
    return image


def _style(axes: Any, label: str) -> None:
    axes.set_ylabel(label)
    axes.grid(True, color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_line(axes: Any, steps: list[int], values: list[float], color: str, label: str) -> None:
    axes.plot(steps, values, color=color, linewidth=1.3)
    axes.set_ylim(bottom=0)
    _style(axes, label)


def _draw_loss(axes: Any, rows: list[dict[str, Any]]) -> None:
    steps, losses = series(rows, "train/lm_loss")
    axes.plot(steps, losses, color=_TRAIN, linewidth=1, label="training")
    if len(losses) >= 20:
        axes.plot(
            steps,
            smooth(losses, max(5, len(losses) // 15)),
            color=_SMOOTH,
            linewidth=1.8,
            label="training, running mean",
        )
    valid_steps, valid = series(rows, "validation/lm_loss")
    if valid:
        axes.plot(valid_steps, valid, color=_VALID, linewidth=1.6, marker="o", markersize=4, label="validation")
        axes.annotate(
            f"{valid[-1]:.3f}", (valid_steps[-1], valid[-1]), xytext=(-4, 8), textcoords="offset points", color=_VALID
        )
    _style(axes, "loss (nats per token)")
    axes.legend(frameon=False)
    _token_axis(axes, rows)


def _token_axis(axes: Any, rows: list[dict[str, Any]]) -> None:
    """A second scale on top: tokens seen, which are proportional to steps."""
    steps, tokens = series(rows, "train/tokens")
    if not steps or not steps[-1]:
        return
    per_step = tokens[-1] / steps[-1]
    unit, name = next(((u, n) for u, n in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")) if tokens[-1] >= u), (1, ""))
    scale = per_step / unit
    top = axes.secondary_xaxis("top", functions=(lambda x: x * scale, lambda x: x / scale))
    top.set_xlabel(f"tokens ({name})" if name else "tokens")
