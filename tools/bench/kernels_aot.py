"""Compile every fused kernel for a Hopper GPU without one: registers, spills, shared memory, instructions, and a safety check.

    python tools/bench/kernels_aot.py [--widths 64x128] [--output benchmarks/results/kernels-aot-sm90.json]

A kernel that spills more than a few registers or wants more shared memory than a block has would run slowly or not at all; one
whose machine code writes a register that an asynchronous product still reads would compute garbage (`sass.py`). Both are known
here before the first device minute is spent. Exit code 1 when a limit is broken or a register overwritten.

With --output, rows of an earlier result in that file are taken over where neither the kernel nor its constants have changed,
and the file is written after every row: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import inspect
import json
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
from megatron.ops.conv import triton as conv_triton
from megatron.ops.conv import triton_kernels as conv_kernels
from megatron.ops.cross_entropy import triton_kernels as cross_entropy_kernels
from megatron.ops.gated import triton_kernels as gated_kernels
from megatron.ops.metala import triton_kernels as metala_kernels
from megatron.ops.metala import triton_step_kernels as metala_step_kernels
from megatron.ops.metala import triton_walk_kernels as metala_walk_kernels
from megatron.ops.metala.triton import step_warps
from megatron.ops.metala.triton_launch import PRECISION
from megatron.ops.norm import triton_kernels as norm_kernels
from megatron.ops.selective_scan import triton as scan_triton
from megatron.ops.selective_scan import triton_gate as scan_gate
from megatron.ops.selective_scan import triton_gate_kernels as gate_kernels
from megatron.ops.selective_scan import triton_kernels as scan_kernels
from megatron.ops.taylor import feature_count
from megatron.ops.taylor import triton_backward_kernels as taylor_backward_kernels
from megatron.ops.taylor import triton_kernels as taylor_kernels
from megatron.ops.taylor import triton_step_kernels as taylor_step_kernels
from megatron.ops.taylor.triton_launch import FORMS as TAYLOR_FORMS
from megatron.ops.tuning import (
    CROSS_ENTROPY,
    METALA,
    Tiles,
    gated_cut,
    metala_cuts,
    metala_rows,
    metala_run,
    norm_cut,
    padded,
    taylor_cut,
    taylor_step_cut,
)  # fmt: skip
from megatron.ops.window import triton_kernels as window_kernels
from megatron.ops.window.triton import step_block
from tools.bench.sass import Listing

Case = tuple[str, Any, dict[str, Any], int, int]
"""(name, kernel, constants, warps, stages)."""

ROOT = Path(__file__).resolve().parents[2]
_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
_TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
_STRIDES = {
    "sa",
    "sda",
    "sdb",
    "sq",
    "sk",
    "sz",
    "sv",
    "sg",
    "so",
    "sy",
    "sx",
    "ss",
    "sdq",
    "sdz",
    "sdv",
    "sdg",
    "sl",
    "su",
    "sdt",
    "sb",
    "sc",
    "sdy",
}
_INTS = _STRIDES | {"T", "D", "N", "n", "PER", "PARTS", "H", "G", "W"}
_LENGTHS = {"T", "D", "N"}
_FLOATS = {"scale", "eps"}
_FP32 = {
    "Sd",
    "dSd",
    "den",
    "dd",
    "counts",
    "decay",
    "running",
    "GL",
    "GM",
    "amount",
    "h0",
    "ht",
    "dht",
    "dh0",
    "damount",
    "inverse",
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
# Of one operator's kernels alone; the same names are narrow elsewhere.
_FP32_OF = {
    "selective_scan": {
        "dt", "a", "b", "c", "same", "ends", "factors", "y", "dy", "borders", "scratch", "dlast", "ddt", "da", "dc", "dgain",
    },
}  # fmt: skip
_OPERANDS = {"qs", "ks", "Sn", "dSn", "dn"}  # of an fp16 model they are fp32: decays, scores and sums leave its range
_INT_POINTERS = {"labels": "*i64", "places": "*i64", "seen": "*i64", "seg": "*i32", "mask": "*i8", "slots": "*i32"}
# Bytes. Heads of up to 64 x 128, which all released models have, must keep to the first pair; wider ones, fp16 and other forms
# of a pass to the second; fp32, which is there for comparisons, to the third.
SPILL_LIMIT, SHARED_LIMIT = 32, 112 * 1024
WIDE_SPILL_LIMIT, WIDE_SHARED_LIMIT = 64, 160 * 1024
FP32_SPILL_LIMIT, FP32_SHARED_LIMIT = 384, 160 * 1024
# The input gradients of 64 x 128: two programs on a multiprocessor are worth spills, which the L1 cache takes (docs/gpu.md).
MEASURED_SPILL = {"bf16": 512, "fp16": 704}


def _own_fp32(kernel: Any) -> set[str]:
    """Arguments that are fp32 in this kernel's operator."""
    return _FP32_OF.get(kernel.fn.__module__.split(".")[2], set())


def _signature(kernel: Any, constants: dict[str, Any], dtype: str) -> dict[str, str]:
    """Type of every argument by its name."""
    kinds = {}
    own = _own_fp32(kernel)
    for name in kernel.arg_names:
        if name in constants:
            kinds[name] = "constexpr"
        elif name in _INTS:
            kinds[name] = "i32"
        elif name in _FLOATS:
            kinds[name] = "fp32"
        else:
            wide = name in _FP32 or name in own or (name in _OPERANDS and dtype == "fp16")
            kinds[name] = _INT_POINTERS.get(name) or ("*fp32" if wide else f"*{dtype}")
    return kinds


def compile_kernel(kernel: Any, constants: dict[str, Any], dtype: str, warps: int, stages: int = 3) -> dict[str, int]:
    """Compile for compute capability 9.0.

    Returns:
        registers per thread, spilled bytes, shared memory in bytes, instructions per warp in all and in the longest loop,
        barriers, asynchronous products with an operand in registers, and how many of those registers are overwritten too early.
    """
    options = {"num_warps": warps, "num_stages": stages}
    signature = _signature(kernel, constants, dtype)
    # As at run time: pointers are aligned; strides and training's lengths are multiples of 16.
    aligned = [
        i for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (name in _STRIDES | _LENGTHS and signature[name] != "constexpr")
    ]  # fmt: skip
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(compiled.asm["ptx"])
        command = [str(tools / "ptxas"), "-v", "--gpu-name=sm_90a", str(ptx), "-o", str(cubin)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        disassemble = [str(tools / "nvdisasm"), "-c", str(cubin)]
        code = Listing(subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout)
    return {
        "registers": int(re.findall(r"Used (\d+) registers", report)[0]),
        "spilled": int(re.findall(r"(\d+) bytes spill stores", report)[0]),
        "shared": int(compiled.metadata.shared),
        "instructions": len(code.instructions),
        "loop": code.longest_loop(),
        "barriers": code.count("BAR"),
        "register_products": code.products_from_registers(),
        "overwritten": len(code.overwritten()),
    }


def case_key(kernel: Any, constants: dict[str, Any], dtype: str, warps: int, stages: int) -> str:
    """Of everything that a row's numbers depend on besides the compiler: code of the kernel and what it calls, constants."""
    fixed = sorted((name, str(value)) for name, value in constants.items())
    code = kernel_code(Path(inspect.getfile(kernel.fn)), kernel.fn.__name__)
    own = _own_fp32(kernel)
    parts = (code, fixed, dtype, warps, stages, sorted(own)) if own else (code, fixed, dtype, warps, stages)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@functools.cache
def kernel_code(path: Path, name: str) -> str:
    """The definitions of a kernel and of all that it uses, here or in other modules of kernels, without documentation."""
    definitions, imported = _definitions(path)
    texts, ahead, done = [], [name], set()
    while ahead:
        current = ahead.pop()
        if current in imported and current not in done:
            texts.append(kernel_code(imported[current], current))
        elif current in definitions and current not in done:
            texts.append(ast.unparse(definitions[current]))
            ahead += [n.id for n in ast.walk(definitions[current]) if isinstance(n, ast.Name)]
        done.add(current)
    return "\n".join(sorted(texts))


@functools.cache
def _definitions(path: Path) -> tuple[dict[str, ast.stmt], dict[str, Path]]:
    """Name -> top-level definition without its docstring; name -> module of kernels that it is imported from."""
    definitions: dict[str, ast.stmt] = {}
    imported: dict[str, Path] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("_kernels"):
            home = ROOT.joinpath(*(node.module or "").split(".")).with_suffix(".py")
            imported |= {alias.asname or alias.name: home for alias in node.names}
        elif isinstance(node, ast.FunctionDef):
            node.body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            definitions[node.name] = node
        elif isinstance(node, ast.Assign):
            definitions |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    return definitions, imported


def metala_cases(k: int, v: int, dtype: str, tiles: Tiles | None = None, form: str = "plain") -> list[Case]:
    """The MetaLA kernels as `ops/metala/triton_launch.py` cuts them, or as `tiles` says.

    form: plain, a training step; everything, with documents, padding and states; token, one token per row.
    """
    tiles = tiles or metala_cuts(k, v, _SIZES[dtype])[0]
    extras = form == "everything"
    none = {} if extras else {"seg": None, "mask": None}
    # Triton makes a constant of an integer that is 1, and of an argument that is not there
    single = {"T": 1, "PER": 1} if form == "token" else {}
    base = {"K": k, "BK": padded(k)} | none | single
    products = base | {"V": v, "DT": _TYPES[dtype], "PREC": PRECISION[_SIZES[dtype]], "HAS_SEG": extras}
    part, whole = products | {"BV": tiles.block_v}, products | {"BV": padded(v)}
    walk = {"STORE": True, "END": True, "KEEP": False}
    first = {"HAS_H0": True} if extras else {"HAS_H0": False, "h0": None}
    last = {"HAS_DHT": True} if extras else {"HAS_DHT": False, "dht": None}
    gate = base | {"ROUND": 0, "HAS_MASK": extras}
    step = {"K": k, "V": v, "BK": padded(k), "BV": padded(v), "ROUND": 0, "HAS_SLOTS": True}
    join = {"K": k, "V": v, "BK": padded(k), "BV": tiles.block_v, "HAS_FIRST": True, "REVERSE": False}
    n, walks, forward, back = metala_kernels, metala_walk_kernels, {"C": tiles.chunk}, {"C": tiles.back}
    kept = {"R": tiles.rows or tiles.chunk, "KEEP": True}
    forward |= {"RUN": metala_run(tiles.chunk, k, _SIZES[dtype], tiles.gate_warps)}
    back |= {"RUN": metala_run(tiles.back, k, _SIZES[dtype], tiles.gate_warps)}
    walking, warps = (tiles.walk_warps, tiles.stages), tiles.warps
    cases: list[tuple[Any, ...]] = [
        ("gate_forward", n.gate_forward, gate | forward | {"KEEP": False, "running": None}, tiles.gate_warps, 3),
        ("state_forward", walks.state_forward, part | walk | first | forward, *walking),
        ("output_forward", n.output_forward, whole | forward | kept, warps, 3),
        ("gate_backward", n.gate_forward, gate | back | {"KEEP": True}, tiles.gate_warps, 3),
        ("states_backward", walks.state_forward, part | walk | first | back, *walking),
        ("output_backward", n.output_backward, base | {"V": v, "BV": padded(v), "R": metala_rows(v)}, 4, 3),
        ("state_backward", walks.state_backward, part | walk | last | back, *walking),
        ("value_backward", n.value_backward, part | back, tiles.value_warps, 3),
        ("input_backward", n.input_backward, part | back | {"HAS_MASK": extras}, tiles.back_warps, tiles.stages),
    ]
    others: list[tuple[Any, ...]] = [
        ("join_parts", walks.join_parts, join, 4, 3),
        ("step_forward", metala_step_kernels.step_forward, step, step_warps(k, v), 3),
    ]
    cases = cases if form != "plain" else cases + others
    return [(name, kernel, _of(kernel, constants), warps, stages) for name, kernel, constants, warps, stages in cases]


def _of(kernel: Any, constants: dict[str, Any]) -> dict[str, Any]:
    """Those constants that the kernel has an argument for."""
    return {name: value for name, value in constants.items() if name in kernel.arg_names}


def conv_cases(width: int, d: int) -> list[Case]:
    """The convolution kernels as `ops/conv/triton.py` cuts them, in training and with everything that a call may have."""
    flags = {"HAS_BIAS": False, "HAS_GATE": False, "HAS_HIST": False, "HAS_SEG": False}
    bare = flags | {"bias": None, "gate": None, "hist": None, "seg": None}
    forward = {"W": width, "BT": conv_triton._TOKENS, "BD": conv_triton._CHANNELS, "SILU": True}
    back = {"W": width, "BT": conv_triton.ROWS, "BD": conv_triton.row_channels(d), "U": conv_triton.UNROLLED, "SILU": True}
    step = {"W": width, "BD": 256, "SILU": True, "HAS_BIAS": False, "HAS_GATE": False, "HAS_SLOTS": True, "bias": None}
    step |= {"gate": None}
    n = conv_kernels
    return [
        ("conv_forward", n.conv_forward, forward | bare, 4, 3),
        ("conv_backward", n.conv_backward, back | bare, 1, 3),
        ("conv_backward_everything", n.conv_backward, back | dict.fromkeys(flags, True), 1, 3),
        ("conv_step", n.conv_step, step, 4, 3),
    ]


def scan_cases(n: int, d: int) -> list[Case]:
    """The selective scan's kernels as `ops/selective_scan/triton.py` cuts them: a training step, everything that a pass may
    have in a sequence of parts, a decode step."""
    k, base = scan_kernels, {**scan_triton.layout(n, d), "N": n, "CHUNK": scan_triton.CHUNK}
    absent = dict.fromkeys(("same", "h0", "dlast", "ends", "factors"))
    bare = {**base, **absent, "HAS_SEG": False, "HAS_H0": False, "HAS_LAST": False, "SPLIT": False, "KEEP": True}
    full = base | {"HAS_SEG": True, "HAS_H0": True, "HAS_LAST": True, "SPLIT": True, "KEEP": True}
    step = {"N": n, "BN": triton.next_power_of_2(n), "HAS_SLOTS": True}
    step |= {"BD": scan_triton.step_channels(n)}
    cases: list[tuple[Any, ...]] = [("scan_forward", k.scan_forward, bare), ("scan_backward", k.scan_backward, bare)]
    cases += [(f"{kernel.fn.__name__}_everything", kernel, full) for kernel in (k.scan_forward, k.scan_backward)]
    cases += [("part_ends", k.part_ends, full), ("part_gradients", k.part_gradients, full)]
    tile = {name: size for name, size in scan_gate.TILE.items() if name != "num_warps"}
    gates: list[Case] = [
        (f"scan_{kernel.fn.__name__}", kernel, tile, 4, 3) for kernel in (gate_kernels.gate_forward, gate_kernels.gate_backward)
    ]
    found = [(name, kernel, _of(kernel, c), 1, 3) for name, kernel, c in cases]
    return [*found, ("scan_step", k.scan_step, step, 4, 3), *gates]


def taylor_cases(f: int, v: int, dtype: str, form: str = "plain") -> list[Case]:
    """The kernels of Taylor attention as `ops/taylor/triton_launch.py` cuts them; forms as in `metala_cases`."""
    extras, tiles = form == "everything", taylor_cut(v, dtype)
    kind = next(kind for kind in TAYLOR_FORMS.values() if kind.name == dtype)
    flags = dict.fromkeys(("HAS_KEEP", "HAS_DECAY", "HAS_SEG"), extras)
    none = {} if extras else {"keep": None, "decay": None, "seg": None}
    single = {"T": 1} if form == "token" else {}
    widths = {"F": f, "V": v, "E": feature_count(f), "BF": padded(f), "BV": padded(v), "C": tiles.chunk}
    base = widths | flags | none | single | {"DT": kind.triton, "PREC": kind.precision}
    first = {"HAS_FIRST": True} if extras else {"HAS_FIRST": False, "first": None}
    walk = base | first | {"BE": tiles.walk_rows, "BV": min(padded(v), tiles.walk_columns), "STORE": True}
    counts: dict[str, Any] = {} if extras else {"counts": None}
    rows, warps = taylor_step_cut(feature_count(f), v)
    step = widths | {"BE": rows, "HAS_SLOTS": True, "HAS_DECAY": extras} | ({} if extras else {"decay": None})
    division = {"V": v, "BV": padded(v), "ROWS": 4096 // padded(v)}
    n, back, walking = taylor_kernels, taylor_backward_kernels, (tiles.walk_warps, tiles.stages)
    cases: list[tuple[Any, ...]] = [
        ("walk", n.walk, walk | counts | {"BACK": False}, *walking),
        ("output", n.output, base | {"BE": tiles.rows, "DIVIDE": True}, tiles.warps, tiles.stages),
        ("walk_back", n.walk, walk | {"BACK": True, "HAS_KEEP": False}, *walking),
        ("taylor_input_backward", back.input_backward, base | {"BE": tiles.back_rows}, tiles.back_warps, tiles.stages),
        ("division_backward", back.division_backward, division, 4, 3),
        ("taylor_state_backward", back.state_backward, base | {"BE": tiles.back_rows}, tiles.back_warps, tiles.stages),
        ("taylor_step", taylor_step_kernels.step_forward, step, warps, 3),
    ]
    return [(name, kernel, _of(kernel, constants), warps, stages) for name, kernel, constants, warps, stages in cases]


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


def gated_cases(d: int) -> list[Case]:
    """The kernels of a gated MLP of width `d`, with SiLU and with the exact GELU."""
    rows, columns, warps = gated_cut(d)
    tile, n = {"ROWS": rows, "BN": columns}, gated_kernels
    return [
        ("gated_forward", n.gated_forward, tile | {"ACT": 0}, warps, 3),
        ("gated_backward", n.gated_backward, tile | {"ACT": 0}, warps, 3),
        ("gated_backward_gelu", n.gated_backward, tile | {"ACT": 1}, warps, 3),
    ]


def window_cases() -> list[Case]:
    """The step of windowed attention at the heads of Based, and with grouped queries at wider ones."""
    n, found = window_kernels, []
    for d, share in ((64, 1), (128, 4)):
        tile = {"SHARE": share, "BW": step_block(d), "BD": padded(d)}
        found.append((f"window_step_{d}", n.window_step, tile, 4, 3))
    return [*found, ("window_count", n.window_count, {"BW": 128}, 1, 3)]


def cross_entropy_cases() -> list[Case]:
    """The kernels of the cross entropy over rows."""
    columns, warps = CROSS_ENTROPY
    n = cross_entropy_kernels
    return [
        ("row_stats", n.row_stats, {"BN": columns}, warps, 3),
        ("row_gradient", n.row_gradient, {"BN": columns}, warps, 3),
    ]


_PRODUCTS = ("state_forward", "output_forward", "value_backward", "state_backward", "input_backward")
"""The kernels with matrix products, whose code differs most with what a pass has."""


def table_cases() -> list[tuple[str, str, Case]]:
    """(label, dtype, case) of every cut in `ops/tuning.py` in bf16, and of the products with documents, padding and states."""
    found = []
    for (_, size, k), cuts in METALA.items():
        if size == 2:
            for i, tiles in enumerate(cuts):
                found += [(f"{k}x{2 * k} cut {i}", "bf16", case) for case in metala_cases(k, 2 * k, "bf16", tiles)]
            if k <= 64:
                everything = metala_cases(k, 2 * k, "bf16", form="everything")
                found += [(f"{k}x{2 * k} everything", "bf16", case) for case in everything if case[0] in _PRODUCTS]
    return found


def form_cases() -> list[tuple[str, str, Case]]:
    """At the width of the released models: one token per row, fp16 and fp32; and the widest heads with documents and states."""
    found = []
    for label, dtype, form in (("token", "bf16", "token"), ("cut 0", "fp16", "plain"), ("cut 0", "fp32", "plain")):
        found += [(f"64x128 {label}", dtype, case) for case in metala_cases(64, 128, dtype, form=form)]
    found += [("128x256 everything", "bf16", case) for case in metala_cases(128, 256, "bf16", form="everything")]
    found = [case for case in found if case[2][0] in _PRODUCTS]
    for dtype, form in (("bf16", "token"), ("fp16", "plain"), ("fp32", "plain")):
        found += [(f"taylor 16x64 {form}", dtype, case) for case in taylor_cases(16, 64, dtype, form)[:4]]
    return found


def other_cases(norms: list[int]) -> list[tuple[str, str, Case]]:
    """The kernels besides MetaLA's, in bf16."""
    found = [("taps 4", "bf16", case) for case in conv_cases(4, 1024)]
    found += [("states 16", "bf16", case) for case in scan_cases(16, 2048)]
    found += [(f"d {d}", "bf16", case) for d in norms for case in norm_cases(d)]
    for f, v, form in ((16, 64, "plain"), (16, 64, "everything"), (16, 128, "plain"), (8, 64, "plain")):
        found += [(f"taylor {f}x{v} {form}", "bf16", case) for case in taylor_cases(f, v, "bf16", form)]
    found += [("d 5632", "bf16", case) for case in gated_cases(5632)]
    found += [("window 128", "bf16", case) for case in window_cases()]
    return found + [("any", "bf16", case) for case in cross_entropy_cases()]


def limits(label: str, dtype: str, kernel: str) -> tuple[int, int]:
    """(spilled bytes per thread, shared bytes per block) that a kernel may take."""
    widths = label.split(" ")[0].split("x")
    if kernel == "input_backward" and dtype in MEASURED_SPILL and padded(int(widths[0])) == 64:
        return MEASURED_SPILL[dtype], WIDE_SHARED_LIMIT
    narrow = len(widths) == 1 or max(map(int, widths)) <= 128
    usual = narrow and dtype == "bf16" and not label.endswith("everything")
    if dtype == "fp32":
        return FP32_SPILL_LIMIT, FP32_SHARED_LIMIT
    return (SPILL_LIMIT, SHARED_LIMIT) if usual else (WIDE_SPILL_LIMIT, WIDE_SHARED_LIMIT)


def case_row(label: str, dtype: str, case: Case, earlier: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A case's numbers: compiled now, or those of the same case in an earlier result."""
    name, kernel, constants, warps, stages = case
    key = case_key(kernel, constants, dtype, warps, stages)
    row: dict[str, Any] = {"kernel": name, "shape": label, "dtype": dtype, "warps": warps, "stages": stages, "key": key}
    if key in earlier:
        return earlier[key] | row
    return row | compile_kernel(kernel, constants, dtype, warps, stages)


def is_over(row: dict[str, Any], label: str, dtype: str) -> bool:
    """Whether a row breaks a limit, or its machine code overwrites what an asynchronous product reads."""
    spill, shared = limits(label, dtype, row["kernel"])
    return bool(row["spilled"] > spill or row["shared"] > shared or row["overwritten"])


def main() -> None:
    """Compile, print a row per kernel, store, judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--widths", nargs="+", help="key x value widths per head, such as 64x128, instead of all")
    parser.add_argument("--forms", action="store_true", help="forms of a pass that are not in the table, instead of it")
    parser.add_argument("--norms", nargs="*", type=int, default=[1024, 2560], help="model widths of the norm kernels")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    cases = table_cases()
    if args.forms:
        cases = form_cases()
    if args.widths:
        cases = [case for case in cases if case[0].split(" ")[0] in args.widths]
    cases += other_cases(args.norms)
    earlier: dict[str, dict[str, Any]] = {}
    if args.output and args.output.exists():
        stored = json.loads(args.output.read_text())
        earlier = {row["key"]: row for row in stored["rows"] if "key" in row and stored["triton"] == triton.__version__}
    rows, broken = [], 0
    for label, dtype, case in cases:
        row = case_row(label, dtype, case, earlier)
        earlier[row["key"]] = row
        over = is_over(row, label, dtype)
        broken += over
        print(" ".join(f"{k}={v}" for k, v in row.items()), "OVER THE LIMIT" if over else "", flush=True)
        rows.append(row)
        if args.output:
            result = {"benchmark": "kernels_aot", "target": "sm_90", "triton": triton.__version__}
            write_json(args.output, result | {"rows": rows})
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
