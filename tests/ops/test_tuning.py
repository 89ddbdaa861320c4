"""The table of cuts: complete, small, and every entry compiled for sm_90 within the limits of tools/bench/kernels_aot.py.

Compiling all of it takes minutes, so the result is stored with a digest of the kernels and the table; a few are compiled again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the fused kernels need Triton: pip install triton")

from megatron.ops.tuning import METALA, metala_cuts, norm_cut, padded

ROOT = Path(__file__).resolve().parents[2]
STORED = {name: ROOT / f"benchmarks/results/kernels-aot-sm90{name}.json" for name in ("", "-triton36")}


def aot(*words: str) -> subprocess.CompletedProcess[str]:
    """A command with the compile check's module as `aot`; in a process of its own, since this one interprets."""
    code = "import sys; sys.argv = sys.argv[:1]; import tools.bench.kernels_aot as aot; " + " ".join(words)
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    return json.loads(STORED[""].read_text())


def test_the_stored_compilations_are_of_these_kernels_and_hold_every_cut() -> None:
    done = aot(
        "import json; print(json.dumps({'digest': aot.sources_digest(),",
        "'cases': [[label, dtype, case[0], *aot.limits(label, dtype)]",
        "for label, dtype, case in aot.table_cases() + aot.other_cases([1024, 2560])]}))",
    )
    assert done.returncode == 0, done.stderr
    now = json.loads(done.stdout)
    for path in STORED.values():
        stored = json.loads(path.read_text())
        assert stored["sources"] == now["digest"], f"kernels or table have changed: see {path.name} in docs/kernels.md"
        rows = {(row["shape"], row["dtype"], row["kernel"]): row for row in stored["rows"]}
        assert len(rows) == len(now["cases"]) == len(stored["rows"])
        for label, dtype, kernel, spill, shared in now["cases"]:
            row = rows[label, dtype, kernel]
            assert row["spilled"] <= spill and row["shared"] <= shared, row


def test_entries_are_few_and_whole_chunks_fit() -> None:
    for (_, size, k), cuts in METALA.items():
        assert 1 <= len(cuts) <= 6 and len(set(cuts)) == len(cuts)
        for tiles in cuts:
            assert tiles.interval % tiles.out == 0 and min(tiles.out, tiles.back) >= 16
            assert padded(2 * k) % tiles.block_v == 0
            # half a chunk of the fastest decay that the kernels take must stay an fp32 number: 2^(3.6 * rows / 2)
            assert 3.61 * max(tiles.out, tiles.back) / 2 < 126, (size, k)


@pytest.mark.parametrize(("k", "v", "entry"), [(24, 48, 32), (64, 128, 64), (80, 160, 128), (16, 128, 64), (33, 20, 64)])
def test_any_width_finds_an_entry_that_holds_it(k: int, v: int, entry: int) -> None:
    for size in (2, 4):
        assert metala_cuts(k, v, size) == METALA["sm_90", size, entry]


def test_wider_heads_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="up to 128 x 256, not 160 x 320"):
        metala_cuts(160, 320, 2)


def test_norm_tiles_are_of_one_size() -> None:
    assert [norm_cut(d)[0] * padded(d) for d in (64, 1024, 1536, 4096, 8192)] == [4096, 4096, 4096, 4096, 8192]


@pytest.mark.slow
def test_kernels_compile_for_hopper_within_their_limits(stored: dict[str, Any]) -> None:
    """Ahead of time, without a GPU, widths of the released models: the same registers, spills, shared memory as stored."""
    command = [sys.executable, "tools/bench/kernels_aot.py", "--widths", "64x128", "--norms", "1024"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("kernel=")]
    assert len(lines) == 7 + 3 + 3 + 2
    if stored["triton"] != __import__("triton").__version__:
        pytest.skip(f"stored with Triton {stored['triton']}: other versions allot registers otherwise")
    known = {" ".join(f"{k}={v}" for k, v in row.items()) for row in stored["rows"]}
    assert {line.strip() for line in lines} <= known
