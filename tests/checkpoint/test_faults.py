"""Small counts of the harnesses in `tests/faults`: random damage, kills inside a save, resume after each step, mesh pairs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron.registry import layer_names
from tests.faults.checkpoint_damage import run
from tests.faults.checkpoint_meshes import MESHES, run_pairs
from tests.faults.checkpoint_resume import stop_everywhere

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("count", [50, pytest.param(300, marks=pytest.mark.slow)])
def test_random_damage_is_named_and_stepped_back_from(count: int) -> None:
    found = run(count, seed=count)
    assert found["not"] == [] and found["left"] == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_killed_inside_a_save(mode: str) -> None:
    """Exit code 0: as many resumes as asked, none wrong, none older than the last completed save."""
    command = [sys.executable, "-m", "tests.faults.checkpoint_kill", "--kills", "2", "--steps", "10", "--mode", mode]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_resume_after_every_step(tmp_path: Path) -> None:
    assert stop_everywhere("metala", 8, 100, tmp_path) == (7, 28, [])


@pytest.mark.slow
@pytest.mark.parametrize("mixer", layer_names())
def test_resume_of_every_mixer(mixer: str, tmp_path: Path) -> None:
    assert stop_everywhere(mixer, 12, 3, tmp_path, only=(1, 5, 9))[2] == []


def pairs(
    folder: Path, saved_on: tuple[tuple[int, int, int], ...], loaded_on: tuple[tuple[int, int, int], ...], dtype: str
) -> int:
    """Number of pairs; weights and optimizer bitwise, loss within 1e-6 relative (another order of sums; bf16: 5e-3)."""
    found = run_pairs(folder, saved_on, loaded_on, dtype)
    assert found["details"] == []
    assert found["worst relative difference of the next loss"] <= (1e-6 if dtype == "fp32" else 5e-3)
    return int(found["pairs"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "saved_on", "loaded_on"),
    [
        ((3, 1), (1, 1, 2), ((2, 1, 1),)),
        pytest.param((1, 3), (2, 1, 2), ((1, 1, 2), (1, 2, 2)), marks=pytest.mark.slow),
        pytest.param((2, 3), (1, 1, 2), ((1, 2, 2),), marks=pytest.mark.slow),
    ],
)
def test_zero_2_and_3_are_recut_like_the_rest(
    zero: tuple[int, int], saved_on: tuple[int, int, int], loaded_on: tuple[tuple[int, int, int], ...], tmp_path: Path
) -> None:
    found = run_pairs(tmp_path, (saved_on,), loaded_on, "fp32", zero)
    assert found["details"] == []
    assert found["pairs"] == len(loaded_on)
    assert found["worst relative difference of the next loss"] <= 1e-6


@pytest.mark.slow
def test_thirty_six_mesh_pairs(tmp_path: Path) -> None:
    assert pairs(tmp_path, MESHES[:4], MESHES, "fp32") == 36


@pytest.mark.slow
def test_mesh_pairs_in_bf16(tmp_path: Path) -> None:
    assert pairs(tmp_path, ((2, 1, 2),), ((1, 4, 1), (1, 2, 2)), "bf16") == 2
