"""The calculated times of kernels: what limits residency, how a loop counts, and that every kernel of a pass has its part."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the fused kernels need Triton: pip install triton")

from megatron.ops.tuning import metala_cuts
from tools.bench import kernel_times
from tools.bench.kernel_times import Work, blocks_per_processor, issue_share, seconds, works

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks/results/kernels-aot-sm90.json"


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks"),
    [
        (255, 0, 8, 1),  # 256 x 256 registers are all there are
        (128, 0, 4, 4),
        (32, 100 * 1024, 4, 2),  # shared memory
        (16, 0, 8, 8),  # 64 warps
    ],
)
def test_what_limits_the_blocks_of_a_multiprocessor(registers: int, shared: int, warps: int, blocks: int) -> None:
    assert blocks_per_processor({"registers": registers, "shared": shared, "warps": warps}) == blocks


def test_the_share_of_issue_slots_grows_with_the_warps() -> None:
    assert [issue_share(w) for w in (8, 16, 64, 100)] == [0.40, 0.55, 0.80, 0.80]
    assert 0.40 < issue_share(12) < 0.55 and issue_share(2) == 0.125


def test_a_loop_counts_once_for_each_iteration() -> None:
    row = {"registers": 128, "shared": 0, "warps": 8, "instructions": 1000, "loop": 400}
    once, four = (seconds(row, Work(132 * 2, n, 2.55e6), 3e12) for n in (1, 4))
    assert four[0] == pytest.approx(once[0] * 2200 / 1000) and once[1] == pytest.approx(1e-6) and once[2] == 2


def test_kernels_with_products_issue_more_slowly() -> None:
    row = {"registers": 128, "shared": 0, "warps": 8, "instructions": 1000, "loop": 0}
    plain, product = (
        seconds(row | {"kernel": name}, Work(132, 1, 1.0), 3e12)[0] for name in ("gate_forward", "value_backward")
    )
    assert product == pytest.approx(plain / 0.7)


def test_every_kernel_of_a_pass_is_counted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stored = {row["kernel"] for row in json.loads(TABLE.read_text())["rows"] if row["shape"] == "64x128 cut 0"}
    parts = {name for name in works(16384, 8, 8, 64, 128, metala_cuts(64, 128, 2)[0]) if not name.startswith("conv")}
    assert parts == stored - {"join_parts", "step_forward"}
    measured = ROOT / "benchmarks/results/gpu-h200.json"
    monkeypatch.setattr(sys, "argv", ["kernel_times.py", "--table", str(TABLE), "--measured", str(measured)])
    kernel_times.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[-3:]] == ["forward", "backward", "both"]
    assert all(" measured=" in line for line in lines[1:-3])
