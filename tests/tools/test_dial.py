"""tools/dial.py: bytes of state of the released shapes, both knobs, files; a config without the knobs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.commands import run_here


def dial(*arguments: str) -> str:
    done = run_here("tools/dial.py", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_state_of_based_and_its_dial(tmp_path: Path) -> None:
    """Per linear layer 16 heads x 153 x 65 fp32 sums; per window 128 keys and values of 1,024 in bf16 and their numbers."""
    out = dial("configs/based-360m.yml", "--windows", "64", "128", "--features", "8", "16", "--output", str(tmp_path / "d"))
    made = json.loads((tmp_path / "d.json").read_text())
    layers = made["layers"]
    assert layers["based"] == {"recurrent": 5 * 16 * 153 * 65 * 4}
    assert layers["base_conv"] == {"convolution": 17 * 2 * 2048 * 2}
    keys = 5 * 128 * 2 * 1024 * 2
    assert keys <= layers["sliding"]["window"] <= 1.01 * keys, "keys and values, and a few numbers beside them"
    assert made["total"] == made["dial"][1][1] and f"{made['total']:,}" in out
    small, large = made["dial"][0][1], made["dial"][1][1]
    assert large - small == 5 * 16 * (153 - 45) * 65 * 4
    assert (tmp_path / "d.png").stat().st_size > 10_000


@pytest.mark.slow
def test_models_without_knobs() -> None:
    """Mamba's is constant; attention keeps every token: 2 x 1,024 numbers per layer and token."""
    assert f"{46 * (2048 * 16 * 4 + 3 * 2048 * 2):,}" in dial("configs/mamba-360m.yml")
    assert "all tokens" in dial("configs/attention-360m.yml", "--tokens", "100")
