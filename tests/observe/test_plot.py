"""loss.png: there is something on it, and what is missing is one clear line."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

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


def test_a_single_point_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "m.jsonl").write_text('{"iteration": 1, "train/lm_loss": 2.0}\n')
    assert plot_metrics(tmp_path / "m.jsonl", tmp_path / "x.png").stat().st_size > 5000


def test_nothing_to_plot_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no training loss was logged"):
        plot_metrics(tmp_path / "absent.jsonl", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_without_matplotlib(metrics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(DataError, match="matplotlib is not installed(.|\n)*pip install matplotlib"):
        plot_metrics(metrics, tmp_path / "x.png")


def test_smoothing_keeps_a_line_and_does_not_lag() -> None:
    line = [float(i) for i in range(30)]
    assert smooth(line, 5)[2:-2] == line[2:-2]
    assert smooth([1.0], 5) == [1.0]
