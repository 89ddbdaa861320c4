"""Fused MetaLA on a GPU: correctness first, then its speed against flash-linear-attention and against the memory bus.

    python tools/bench/metala_gpu.py --output benchmarks/results/metala-gpu.json    meant for under 8 minutes on an H100
    python tools/bench/metala_gpu.py --check                                        tiny shapes, Triton's interpreter, any CPU
    python tools/bench/metala_gpu.py --tune                                         times every cut of ops/tuning.py instead

Sections, in this order, each left out (and named in the result) when the time is used up: correctness against fp64; the
operator forward and backward at 16,384 tokens; long lonely sequences, where the walk over the chunks is split; one decode step;
a layer; a whole model's training step and token step at 380M and 1.3B. Peers are `chunk_gla` of flash-linear-attention 0.6.0
with the rest by torch, (a) eager and (b) compiled; the floor (c) comes from the copy bandwidth and product rate measured at the
start. A JSON is written, and a PNG beside it.

On a machine without internet: `make gpu-wheels` here, copy the repository with its folder `wheels/`, and there
    pip install --no-index --no-deps wheels/*.whl
beside the torch, triton, transformers and numpy that it has. `pytest -m gpu` is the correctness list in full.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if "--check" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported

import torch
from torch import Tensor

from megatron.files import write_json
from megatron.ops.metala import cut_packed, metala_packed, metala_step_, triton_launch
from megatron.ops.tuning import METALA
from tools.bench.gpu_models import layer_rows, model_rows
from tools.bench.gpu_peers import Variant, fla_step, fla_version, variants
from tools.bench.gpu_plot import draw
from tools.bench.gpu_timing import Clock, copy_bandwidth, floor_ms, product_rate

SHAPES = ((1024, 8), (1024, 16), (2048, 8), (2048, 16), (2560, 20), (3072, 24))
MODELS = {"380M": (1024, 24, 8, 2816), "1.3B": (2048, 24, 16, 5632)}


class Bench:
    """Device, clock, rates and the sizes of one run."""

    def __init__(self, check: bool, budget: float, all_widths: bool = False) -> None:
        self.check, self.end, self.all_widths = check, time.monotonic() + budget, all_widths
        self.device = "cpu" if check else "cuda"
        self.dtype = torch.float32 if check else torch.bfloat16
        self.clock = Clock(self.device, 0.0 if check else 0.25)
        self.bandwidth, self.rate = copy_bandwidth(self.device), product_rate(self.device)

    def late(self) -> bool:
        """Whether the time is used up."""
        return time.monotonic() > self.end

    def inputs(self, b: int, t: int, d: int, heads: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """A packed projection with trained-like gates (mean 4) and w, leaves."""
        g = torch.Generator().manual_seed(0)
        packed = torch.randn(b, t, 3 * d, generator=g)
        packed[..., d // 2 : d] = packed[..., d // 2 : d] * 1.5 + 4
        w = torch.randn(heads, d // (2 * heads), generator=g) * 0.3
        dtype = dtype or self.dtype
        return packed.to(self.device, dtype).requires_grad_(), w.to(self.device, dtype).requires_grad_()


def correctness(bench: Bench) -> list[dict[str, Any]]:
    """Relative error of output and gradients against fp64 token by token, and whether it is within the limits."""
    rows = []
    cases = (
        [(64, 2, 70, 4.0)]
        if bench.check
        else [(d, 2, t, gate) for d in (128, 256, 320) for t in (65, 200) for gate in (4, 2, -4)]
    )
    for d, heads, t, gate in cases:
        packed, w = bench.inputs(2, t, d, heads)
        with torch.no_grad():
            packed[..., d // 2 : d] += gate - 4
        exact = [x.detach().double().requires_grad_() for x in (packed, w)]
        found = []
        for leaves, backend in ((exact, "reference"), ([packed, w], "triton")):
            y = metala_packed(*leaves, backend=backend)[0]
            up = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device, y.dtype)
            found.append([y, *torch.autograd.grad(y, leaves, up)])
        errors = [float((a.detach().double() - b.detach()).norm() / b.detach().norm()) for b, a in zip(*found, strict=True)]
        good = errors[0] <= 5e-3 and max(errors[1:]) <= 1e-2
        rows.append({"d": d, "heads": heads, "t": t, "gate": gate, "errors": errors, "good": good})
    return rows


def times(bench: Bench, run: Variant, packed: Tensor, w: Tensor) -> dict[str, float]:
    """Milliseconds of the forward alone and of the backward alone; peak MiB of both together."""
    if bench.clock.cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with torch.no_grad():
        forward = bench.clock(lambda: run(packed, w))
    y = run(packed, w)
    up = torch.ones_like(y)
    backward = bench.clock(lambda: torch.autograd.grad(y, (packed, w), up, retain_graph=True))
    row = {"forward_ms": forward, "backward_ms": backward}
    if bench.clock.cuda:
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return row


def operator_rows(bench: Bench, cases: list[tuple[int, int, int, int]]) -> list[dict[str, Any]]:
    """Every variant and the floor at (d, heads, batch, length)."""
    rows = []
    for d, heads, b, t in cases:
        packed, w = bench.inputs(b, t, d, heads)
        row: dict[str, Any] = {"d": d, "heads": heads, "batch": b, "length": t}
        for name, run in variants(bench.device).items():
            # the peer tries 274 configurations for each new head width; the aims are about 64 x 128
            if not name.startswith("fla") or ((w.shape[1] == 64 or bench.all_widths) and not bench.late()):
                row[name] = times(bench, run, packed, w)
        for backward in (False, True):
            floor = floor_ms(d, heads, b * t, bench.bandwidth, bench.rate, backward, packed.element_size())
            row["floor backward" if backward else "floor forward"] = floor
        rows.append(row)
    return rows


def decode_rows(bench: Bench, cases: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """One token of an operator at (d, heads, batch): ours in place, the peer, and the state's bytes once in and out."""
    rows = []
    for d, heads, b in cases:
        packed, w = (x.detach() for x in bench.inputs(b, 1, d, heads))
        state = torch.zeros(b, heads, w.shape[1], d // heads, device=bench.device)
        parts = cut_packed(packed[:, 0], w)
        row: dict[str, Any] = {"d": d, "heads": heads, "batch": b}
        row["ours"] = {"ms": bench.clock(lambda: metala_step_(*parts, w, state, backend="triton"))}  # noqa: B023
        row["floor"] = {"ms": 2 * state.numel() * 4 / bench.bandwidth / 1e9}
        if not bench.check and fla_version() is not None:
            step = fla_step()
            row["fla + eager glue"] = {"ms": bench.clock(lambda: step(packed, w, state))}  # noqa: B023
        rows.append(row)
    return rows


def tune(bench: Bench) -> list[dict[str, Any]]:
    """Forward and backward of every cut in the table; the best of an entry should stand first there."""
    rows = []
    for (arch, size, k), cuts in METALA.items():
        if size != bench.dtype.itemsize:
            continue
        heads = 2 if bench.check else 2048 // (2 * k)
        packed, w = bench.inputs(1 if bench.check else 8, 40 if bench.check else 2048, 2 * k * heads, heads)
        for tiles in cuts:
            setattr(triton_launch, "metala_cuts", lambda *_, tiles=tiles: (tiles,))  # noqa: B010
            row = {"arch": arch, "key width": k, "tiles": str(tiles)} | times(bench, variants("cpu")["ours"], packed, w)
            print(row, flush=True)
            rows.append(row)
    return rows


def sections(bench: Bench) -> dict[str, Callable[[], list[dict[str, Any]]]]:
    """Name -> what it measures, in the order in which they run."""
    if bench.check:
        small = {"tiny": (32, 1, 2, 48)}
        return {
            "operator": lambda: operator_rows(bench, [(64, 2, 2, 33)]),
            "lonely sequences": lambda: operator_rows(bench, [(64, 2, 1, 70)]),
            "decode": lambda: decode_rows(bench, [(64, 2, 2)]),
            "layer": lambda: layer_rows(bench.device, bench.dtype, bench.clock, [(64, 2, 1, 20)]),
            "model": lambda: model_rows(bench.device, small, 16, (2,), 3, 32),
        }
    return {
        "operator": lambda: operator_rows(bench, [(d, h, 8, 2048) for d, h in SHAPES]),
        "lonely sequences": lambda: operator_rows(bench, [(1024, 8, 1, 8192), (1024, 8, 2, 8192), (1024, 8, 4, 4096)]),
        "decode": lambda: decode_rows(bench, [(1024, 8, 1), (1024, 8, 64), (2048, 16, 64), (2048, 16, 256)]),
        "layer": lambda: layer_rows(bench.device, bench.dtype, bench.clock, [(1024, 8, 8, 2048), (2048, 16, 8, 2048)]),
        "model": lambda: model_rows(bench.device, MODELS, 2048, (16, 8, 4, 2, 1), 64, 50304),
    }


def measure(bench: Bench) -> dict[str, Any]:
    """Correctness, then every section there is time for."""
    result: dict[str, Any] = {"correctness": correctness(bench), "left_out": []}
    for row in result["correctness"]:
        print(row, flush=True)
    for name, section in sections(bench).items():
        if bench.late() or not all(row["good"] for row in result["correctness"]):
            result["left_out"].append(name)
            continue
        result[name] = section()
        for row in result[name]:
            print(name, row, flush=True)
    return result


def main() -> None:
    """Parse, run, store, judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--check", action="store_true", help="tiny shapes on this CPU, to see that the script works")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds after which no further section starts")
    parser.add_argument("--all-widths", action="store_true", help="peers at every head width: minutes of their tuning for each")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if not args.check and not torch.cuda.is_available():
        sys.exit("error: no CUDA device here\n  try: --check")
    bench = Bench(args.check, args.budget, args.all_widths)
    result: dict[str, Any] = {
        "benchmark": "metala_gpu",
        "device": platform.machine() if args.check else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": __import__("triton").__version__,
        "flash-linear-attention": fla_version(),
        "copy_tb_per_s": bench.bandwidth,
        "product_tflop_per_s": bench.rate,
    }
    result |= {"tune": tune(bench)} if args.tune else measure(bench)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, result)
        if not args.tune:
            draw(result, args.output.with_suffix(".png"))
        print(f"written: {args.output}")
    sys.exit(0 if all(row["good"] for row in result.get("correctness", [])) else 1)


if __name__ == "__main__":
    main()
