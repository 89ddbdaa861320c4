"""The table of cuts: complete, small, and every entry compiled for sm_90 within the limits of tools/bench/kernels_aot.py.

Compiling all of it takes minutes, so the result is stored, each row with a digest of its kernel; a few are compiled again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the fused kernels need Triton: pip install triton")

from megatron.ops.tuning import METALA, metala_cuts, norm_cut, padded

ROOT = Path(__file__).resolve().parents[2]
STORED = {name: ROOT / f"benchmarks/results/kernels-aot-sm90{name}.json" for name in ("", "-triton36", "-forms")}


OLDER_HAS = ("64x128", "taps", "states", "d", "taylor", "window", "any")
"""What is compiled with the older Triton too: the head width of the released models, and the kernels besides MetaLA's."""


def aot(*words: str) -> subprocess.CompletedProcess[str]:
    """A command with the compile check's module as `aot`; in a process of its own, since this one interprets."""
    code = "import sys; sys.argv = sys.argv[:1]; import tools.bench.kernels_aot as aot; " + " ".join(words)
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_stored_compilations_are_of_these_kernels_and_hold_every_cut() -> None:
    """Each row's key is of the kernel's code and constants; spills stay in bounds, no operand in flight is overwritten."""
    done = aot(
        "import json; print(json.dumps([[[label, dtype, case[0], aot.case_key(case[1], case[2], dtype, *case[3:]),",
        "*aot.limits(label, dtype, case[0])] for label, dtype, case in cases]",
        "for cases in (aot.table_cases() + aot.other_cases([1024, 2560]), aot.form_cases())]))",
    )
    assert done.returncode == 0, done.stderr
    table, forms = json.loads(done.stdout)
    assert len(forms) == 4 * 5 + 3 * 4
    older = [case for case in table if case[0].split(" ")[0] in OLDER_HAS]
    for name, expected in {"": table, "-triton36": older, "-forms": forms}.items():
        path = STORED[name]
        rows = {(row["shape"], row["dtype"], row["kernel"]): row for row in json.loads(path.read_text())["rows"]}
        assert len(rows) == len(expected) or name == "-forms"  # its command adds the kernels besides MetaLA's
        for label, dtype, kernel, key, spill, shared in expected:
            row = rows[label, dtype, kernel]
            assert row["key"] == key, f"{kernel} or its cut has changed: see {path.name} in docs/kernels.md"
            assert row["spilled"] <= spill and row["shared"] <= shared and row["overwritten"] == 0, row
        assert sum(row["register_products"] for row in rows.values()) > 30  # the check has something to look at


def test_entries_are_few_and_whole_chunks_fit() -> None:
    for (_, size, k), cuts in METALA.items():
        assert 1 <= len(cuts) <= 6 and len(set(cuts)) == len(cuts)
        for tiles in cuts:
            assert min(tiles.chunk, tiles.back) >= 16
            assert padded(2 * k) % tiles.block_v == 0
            # half a chunk of the fastest decay that the kernels take must stay an fp32 number: 2^(3.6 * rows / 2)
            assert 3.61 * max(tiles.chunk, tiles.back) / 2 < 126, (size, k)


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
def test_a_stored_compilation_is_what_the_compiler_makes() -> None:
    """One kernel compiled again, ahead of time and without a GPU, and its machine code checked again; three seconds of 25."""
    stored = json.loads(STORED["-forms"].read_text())
    done = aot(
        "import json; label, dtype, case = next(c for c in aot.form_cases() if c[2][0] == 'value_backward');",
        "print(json.dumps([aot.triton.__version__, aot.case_row(label, dtype, case, {})]))",
    )
    assert done.returncode == 0, done.stderr
    version, row = json.loads(done.stdout)
    kept = next(r for r in stored["rows"] if r["key"] == row["key"])
    assert row["overwritten"] == 0 and row["register_products"] > 0
    assert row == kept or version != stored["triton"]
