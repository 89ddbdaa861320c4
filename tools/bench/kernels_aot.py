"""Compile every fused kernel for a Hopper GPU without one, and report registers, spills and shared memory.

    python tools/bench/kernels_aot.py [--widths 64x128] [--output benchmarks/results/kernels-aot-sm90.json]

A kernel that spills more than a few registers or wants more shared memory than a block has would run slowly or not at all; here
it is known before the first device minute is spent. Exit code 1 when a limit is broken.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # compiled functions, whatever the caller's tests use
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron.files import write_json
from megatron.ops import conv_kernels, conv_triton, cross_entropy_kernels, metala_kernels, metala_step_kernels, norm_kernels
from megatron.ops.metala_launch import PRECISION
from megatron.ops.metala_step_triton import step_warps
from megatron.ops.tuning import CROSS_ENTROPY, METALA, Tiles, metala_cuts, norm_cut, padded

Case = tuple[str, Any, dict[str, Any], int, int]
"""(name, kernel, constants, warps, stages)."""

_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
_TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
_STRIDES = {"sq", "sz", "sv", "sg", "so", "sy", "sx", "sdq", "sdz", "sdv", "sdg", "sl"}
_INTS = _STRIDES | {"T", "D", "N", "PER", "PARTS", "H"}
_FLOATS = {"scale", "eps"}
_FP32 = {
    "h0",
    "ht",
    "dht",
    "dh0",
    "damount",
    "dw",
    "db",
    "state",
    "keep",
    "end",
    "first",
    "start",
    "last",
    "peak",
    "total",
    "picked",
    "weights",
}
_INT_POINTERS = {"labels": "*i64", "seg": "*i32", "mask": "*i8", "slots": "*i32"}
# Bytes. Heads of up to 64 x 128, which all released models have, must keep to the first pair in 16 bits with their first cut;
# other cuts are there to be tried, and fp32 is for comparisons. For wider heads the main backward spills a little: half-size
# tiles would not, but would store and read twice as many states, which costs far more.
SPILL_LIMIT, SHARED_LIMIT = 64, 100 * 1024
WIDE_SPILL_LIMIT, WIDE_SHARED_LIMIT = 160, 112 * 1024
# fp32 at these widths is for tests on a GPU alone: its tiles fit a block's 227 KiB and nothing more is asked of it.
WIDE_FP32_SPILL_LIMIT, WIDE_FP32_SHARED_LIMIT = 2048, 200 * 1024


def _signature(kernel: Any, constants: dict[str, Any], dtype: str) -> dict[str, str]:
    """Type of every argument by its name."""
    kinds = {}
    for name in kernel.arg_names:
        if name in constants:
            kinds[name] = "constexpr"
        elif name in _INTS:
            kinds[name] = "i32"
        elif name in _FLOATS:
            kinds[name] = "fp32"
        else:
            kinds[name] = _INT_POINTERS.get(name) or ("*fp32" if name in _FP32 else f"*{dtype}")
    return kinds


def compile_kernel(kernel: Any, constants: dict[str, Any], dtype: str, warps: int, stages: int = 3) -> dict[str, int]:
    """Compile for compute capability 9.0; registers per thread, spilled bytes, shared memory in bytes."""
    signature = _signature(kernel, constants, dtype)
    # As at run time: pointers are aligned, and strides are multiples of 16 since every head width is.
    aligned = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*") or name in _STRIDES]
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as handle:
        handle.write(compiled.asm["ptx"])
        handle.flush()
        command = [str(ptxas), "-v", "--gpu-name=sm_90a", handle.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spills = re.findall(r"Used (\d+) registers", said), re.findall(r"(\d+) bytes spill stores", said)
    return {"registers": int(registers[0]), "spilled": int(spills[0]), "shared": int(compiled.metadata.shared)}


def metala_cases(k: int, v: int, dtype: str, tiles: Tiles | None = None) -> list[Case]:
    """The MetaLA kernels as `metala_launch.py` cuts them, or as `tiles` says."""
    tiles = tiles or metala_cuts(k, v, _SIZES[dtype])[0]
    flags = {"HAS_SEG": False, "HAS_MASK": False}
    common = {
        "K": k,
        "V": v,
        "BK": padded(k),
        "DT": _TYPES[dtype],
        "PREC": PRECISION[_SIZES[dtype]],
        "ROUND": 0,
    }
    part, whole = common | flags | {"BV": tiles.block_v}, common | flags | {"BV": padded(v)}
    walk = {"STORE": True, "END": True, "KEEP": False}
    step = {"K": k, "V": v, "BK": padded(k), "BV": padded(v), "ROUND": 0, "HAS_SLOTS": True}
    join = {"K": k, "V": v, "BK": padded(k), "BV": tiles.block_v, "HAS_FIRST": True, "REVERSE": False}
    n, cut = metala_kernels, (tiles.warps, tiles.stages)
    return [
        ("state_forward", n.state_forward, part | walk | {"C": tiles.interval, "HAS_H0": False}, *cut),
        ("output_forward", n.output_forward, whole | {"C": tiles.out, "NSUP": tiles.interval // tiles.out}, *cut),
        ("output_backward", n.output_backward, whole | {"C": tiles.back}, *cut),
        ("state_backward", n.state_backward, part | walk | {"C": tiles.back, "HAS_DHT": False}, *cut),
        ("input_backward", n.input_backward, part | {"C": tiles.back}, *cut),
        ("join_parts", n.join_parts, join, 4, 3),
        ("step_forward", metala_step_kernels.step_forward, step, step_warps(k, v), 3),
    ]


def conv_cases(width: int) -> list[Case]:
    """The convolution kernels as `conv_triton.py` cuts them."""
    flags = {"HAS_BIAS": False, "HAS_GATE": False, "HAS_HIST": False, "HAS_SEG": False}
    tile = {"W": width, "BT": conv_triton._TOKENS, "BD": conv_triton._CHANNELS, "SILU": True} | flags
    step = {"W": width, "BD": 256, "SILU": True, "HAS_BIAS": False, "HAS_SLOTS": True}
    n = conv_kernels
    return [
        ("conv_forward", n.conv_forward, tile, 4, 3),
        ("conv_backward", n.conv_backward, tile, 4, 3),
        ("conv_step", n.conv_step, step, 4, 3),
    ]


def norm_cases(d: int) -> list[Case]:
    """The norm kernels at model width `d`, largest forms: LayerNorm with an addition in front, RMSNorm without a gain."""
    rows, warps = norm_cut(d)
    tile, n = {"BD": padded(d), "ROWS": rows}, norm_kernels
    full = tile | {"CENTRED": True, "HAS_WEIGHT": True, "HAS_BIAS": True}
    bare = tile | {"CENTRED": False, "HAS_WEIGHT": False, "HAS_BIAS": False}
    return [
        ("norm_forward", n.norm_forward, full | {"HAS_ADDED": True}, warps, 3),
        ("norm_backward", n.norm_backward, full | {"HAS_TOTAL": True}, warps, 3),
        ("norm_backward_bare", n.norm_backward, bare | {"HAS_TOTAL": True}, warps, 3),
    ]


def cross_entropy_cases() -> list[Case]:
    """The kernels of the cross entropy over rows."""
    columns, warps = CROSS_ENTROPY
    n = cross_entropy_kernels
    return [
        ("row_stats", n.row_stats, {"BN": columns}, warps, 3),
        ("row_gradient", n.row_gradient, {"BN": columns}, warps, 3),
    ]


def table_cases() -> list[tuple[str, str, Case]]:
    """(label, dtype, case) of every cut in `ops/tuning.py`, in both precisions; and of widths that are no powers of two."""
    found = []
    for (_, size, k), cuts in METALA.items():
        dtype = "fp32" if size == 4 else "bf16"
        for i, tiles in enumerate(cuts):
            found += [(f"{k}x{2 * k} cut {i}", dtype, case) for case in metala_cases(k, 2 * k, dtype, tiles)]
    return found + [(f"{k}x{2 * k} cut 0", "bf16", case) for k in (80, 96) for case in metala_cases(k, 2 * k, "bf16")]


def other_cases(norms: list[int]) -> list[tuple[str, str, Case]]:
    """The kernels besides MetaLA's, in bf16."""
    found = [("taps 4", "bf16", case) for case in conv_cases(4)]
    found += [(f"d {d}", "bf16", case) for d in norms for case in norm_cases(d)]
    return found + [("any", "bf16", case) for case in cross_entropy_cases()]


def limits(label: str, dtype: str) -> tuple[int, int]:
    """(spilled bytes per thread, shared bytes per block) that a kernel may take."""
    widths = label.split(" ")[0].split("x")
    if len(widths) == 2 and max(map(int, widths)) > 128:
        return (WIDE_FP32_SPILL_LIMIT, WIDE_FP32_SHARED_LIMIT) if dtype == "fp32" else (WIDE_SPILL_LIMIT, WIDE_SHARED_LIMIT)
    return SPILL_LIMIT if dtype != "fp32" and label.endswith("cut 0") else WIDE_SPILL_LIMIT, SHARED_LIMIT


def sources_digest() -> str:
    """SHA-256 over the kernels' and the table's text: says whether a stored result is about these kernels."""
    folder = Path(metala_kernels.__file__).parent
    texts = [path.read_bytes() for path in [*sorted(folder.glob("*_kernels.py")), folder / "tuning.py"]]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()


def main() -> None:
    """Compile, print a row per kernel, store, judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--widths", nargs="+", help="key x value width per head instead of the whole table, first cut, bf16")
    parser.add_argument("--norms", nargs="*", type=int, default=[1024, 2560], help="model widths of the norm kernels")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    cases = table_cases()
    if args.widths:
        pairs = [tuple(map(int, widths.split("x"))) for widths in args.widths]
        cases = [(f"{k}x{v} cut 0", "bf16", case) for k, v in pairs for case in metala_cases(k, v, "bf16")]
    rows, broken = [], 0
    for label, dtype, (name, kernel, constants, warps, stages) in cases + other_cases(args.norms):
        row: dict[str, Any] = {"kernel": name, "shape": label, "dtype": dtype, "warps": warps, "stages": stages}
        row |= compile_kernel(kernel, constants, dtype, warps, stages)
        spill, shared = limits(label, dtype)
        over = row["spilled"] > spill or row["shared"] > shared
        broken += over
        print(" ".join(f"{k}={v}" for k, v in row.items()), "OVER THE LIMIT" if over else "", flush=True)
        rows.append(row)
    if args.output:
        result = {"benchmark": "kernels_aot", "target": "sm_90", "triton": triton.__version__, "sources": sources_digest()}
        write_json(args.output, result | {"rows": rows})
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
