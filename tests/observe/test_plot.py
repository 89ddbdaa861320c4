"""loss.png: there is something on it, and what is missing is one clear line."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.errors import DataError
from megatron.observe.plot import plot_metrics, smooth


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    """200 logged steps with five validations."""
    rows = []
    for i in range(1, 201):
        row = {
            "iteration": i,
            "train/lm_loss": 2 + 6 * math.exp(-i / 40) + 0.1 * math.sin(i),
            "train/learning_rate": 1e-3 * min(1, i / 20),
            "train/grad_norm": 1 + 0.2 * math.cos(i),
            "train/tokens": i * 4096,
        }
        if i % 40 == 0:
            row["validation/lm_loss"] = 2.2 + 6 * math.exp(-i / 40)
        rows.append(row)
    rows.append({"iteration": 201, "train/lm_loss": None})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _pixels(path: Path) -> np.ndarray:
    image = pytest.importorskip("PIL.Image")
    return np.asarray(image.open(path).convert("RGB")).astype(int)


def _near(pixels: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    return np.abs(pixels - np.array(color)).sum(axis=2) < 40


def _series_of(figure: Any, panel: int) -> dict[str, tuple[list[float], list[float]]]:
    """Label (or its number) -> points of the curves in a panel."""
    lines = figure.axes[panel].get_lines()
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were drawn, to look into."""
    agg = pytest.importorskip("matplotlib.backends.backend_agg")
    found: list[Any] = []
    made = agg.FigureCanvasAgg.__init__
    monkeypatch.setattr(agg.FigureCanvasAgg, "__init__", lambda self, figure: (found.append(figure), made(self, figure))[1])
    return found


def test_the_picture_shows_the_curves(metrics: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = plot_metrics(metrics, tmp_path / "loss.png", "a run")
    pixels = _pixels(path)
    height, width = pixels.shape[:2]
    assert width > 1000 and height > 800
    train, valid = _near(pixels, (0x08, 0x51, 0x9C)), _near(pixels, (0xD9, 0x48, 0x01))
    rate, norm = _near(pixels, (0x31, 0xA3, 0x54)), _near(pixels, (0x75, 0x6B, 0xB1))
    for curve in (train, valid, rate, norm):
        columns = np.flatnonzero(curve.any(axis=0))
        assert columns[-1] - columns[0] > width / 2
    left, right = train[:, : width // 4], train[:, 3 * width // 4 :]
    low = np.flatnonzero(right[height // 4 :].any(axis=1))[0] + height // 4
    assert np.flatnonzero(left.any(axis=1))[0] < low, "the loss falls"
    assert np.flatnonzero(rate.any(axis=1))[0] > np.flatnonzero(train.any(axis=1))[-1] - 5, "the rate lies below the loss"


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_mean_of_the_interval_is_drawn_and_smoothed(tmp_path: Path, drawn: list[Any]) -> None:
    rows = [{"iteration": 10 * i, "train/lm_loss": 3.0 + i % 2, "train/lm_loss_mean": 9.0 - i / 10} for i in range(1, 41)]
    plot_metrics(_write(tmp_path / "m.jsonl", rows), tmp_path / "x.png")
    steps, means = [row["iteration"] for row in rows], [row["train/lm_loss_mean"] for row in rows]
    curves = _series_of(drawn[0], 0)
    assert curves["training, logged step"] == (steps, [row["train/lm_loss"] for row in rows])
    assert curves["training, mean of the interval"] == (steps, means)
    assert curves["training, running mean of 5 points"] == (steps, smooth(means, 5))


def test_every_step_logged_needs_no_second_curve(tmp_path: Path, drawn: list[Any]) -> None:
    rows = [{"iteration": i, "train/lm_loss": 3.0, "train/lm_loss_mean": 3.0} for i in (1, 2, 3)]
    plot_metrics(_write(tmp_path / "m.jsonl", rows), tmp_path / "x.png")
    assert list(_series_of(drawn[0], 0)) == ["training, logged step"]


def test_a_single_point_is_seen_in_every_panel(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    row = {"iteration": 1, "train/lm_loss": 2.0, "train/learning_rate": 1e-3, "train/grad_norm": 1.5}
    pixels = _pixels(plot_metrics(_write(tmp_path / "m.jsonl", [row]), tmp_path / "x.png"))
    for color in ((0xC6, 0xDB, 0xEF), (0x31, 0xA3, 0x54), (0x75, 0x6B, 0xB1)):
        assert _near(pixels, color).sum() > 20, color


def test_there_is_no_panel_without_numbers(tmp_path: Path, drawn: list[Any]) -> None:
    plot_metrics(_write(tmp_path / "m.jsonl", [{"iteration": 1, "train/lm_loss": 2.0}]), tmp_path / "x.png")
    assert [axes.get_ylabel() for axes in drawn[0].axes] == ["loss (nats per token)"]


def test_accuracy_has_a_panel_where_a_task_has_answers(tmp_path: Path, drawn: list[Any]) -> None:
    rows: list[dict[str, Any]] = [{"iteration": i, "train/lm_loss": 2.0, "train/grad_norm": 1.0} for i in range(1, 5)]
    rows[1]["validation/accuracy"], rows[3]["validation/accuracy"], rows[3]["test/accuracy"] = 0.25, 0.75, 0.5
    plot_metrics(_write(tmp_path / "m.jsonl", rows), tmp_path / "x.png")
    assert [axes.get_ylabel() for axes in drawn[0].axes] == ["loss (nats per token)", "accuracy", "gradient norm"]
    assert _series_of(drawn[0], 1) == {"validation": ([2, 4], [0.25, 0.75]), "test": ([4], [0.5])}


def test_nothing_to_plot_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no training loss was logged"):
        plot_metrics(tmp_path / "absent.jsonl", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_a_picture_that_cannot_be_written_is_said(metrics: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="no plot: it cannot be written"):
        plot_metrics(metrics, tmp_path / "file" / "x.png")


def test_without_matplotlib(metrics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(DataError, match="matplotlib is not installed(.|\n)*pip install matplotlib"):
        plot_metrics(metrics, tmp_path / "x.png")


def test_the_running_mean_does_not_look_ahead() -> None:
    values = [5.0, 4.0, 6.0, 3.0, 2.0, 7.0]
    assert smooth(values, 3) == [5.0, 4.5, 5.0, 13 / 3, 11 / 3, 4.0]
    for end in range(1, len(values)):
        assert smooth(values, 3)[:end] == smooth(values[:end], 3), "a later point must not change an earlier mean"
