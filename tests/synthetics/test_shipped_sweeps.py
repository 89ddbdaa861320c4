"""Every shipped sweep describes models and data: its points exist, and those of the papers' figures have the papers' grids."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.synthetics import read_sweep

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "synthetics"
SWEEPS = sorted(path for path in FOLDER.glob("*.yml") if "\nfamilies:" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_describes_its_points(path: Path) -> None:
    points = read_sweep(path)
    assert len({point.key() for point in points}) == len(points) > 1
    assert f"configs/synthetics/{path.name}" in path.read_text(encoding="utf-8")  # the command in its head


@pytest.mark.parametrize(
    ("name", "family", "models", "rates"),
    [
        ("mqar-based", "based", {"hidden_size": {48, 64, 128}, "based_feature_width": {8, 16, 24}}, 4),
        ("mqar-based", "mamba", {"hidden_size": {64, 128, 256}, "mamba_state_size": {8, 16, 24}}, 4),
        ("mqar-metala-256", "metala", {"hidden_size": {64, 128, 256, 512}}, 4),
        ("mqar-metala-512", "metala", {"hidden_size": {64, 128, 256, 512}}, 8),
        ("mqar-metala-80", "mamba", {"hidden_size": {64, 128}}, 8),
        ("sets-jrt", "jrt", {"hidden_size": {36, 48, 64, 96, 128}, "jrt_feature_width": {4, 8, 16, 24}, "seed": {123, 2}}, 3),
        ("mad-memorization", "metala", {"weight_decay": {0.0, 0.1}}, 3),
    ],
)
def test_the_grids_of_the_papers(name: str, family: str, models: dict[str, set[float]], rates: int) -> None:
    points = [point for point in read_sweep(FOLDER / f"{name}.yml") if point.name == family]
    size = rates
    for key, values in models.items():
        assert {point.tags[key] for point in points} == values
        size *= len(values)
    assert len(points) == size and len({point.tags["learning_rate"] for point in points}) == rates
