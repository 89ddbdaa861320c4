"""What the MetaLA and convolution kernels should take, calculated from what they compile to, beside what a GPU measured.

    python tools/bench/kernel_times.py [--tokens 16384] [--batch 8] [--width 1024] [--heads 8] [--table FILE]
        [--bandwidth 3.0] [--measured benchmarks/results/gpu-h200.json]

A kernel takes the longer of two times: its bytes at 85 % of the copy bandwidth (H100 3.0 TB/s, H200 4.25), and its instructions
at the rate that a multiprocessor with so many resident warps issues them, a share of four a cycle. Kernels with matrix products
wait at barriers and reach 0.7 of that share: the correction of the first measurement, on an H200 (0.62 to 0.84). Each value is
read or written once; what two programs of one head read twice comes from the L2 cache.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.ops.tuning import Tiles, metala_cuts, metala_rows

PROCESSORS, CLOCK, ISSUES = 132, 1.755e9, 4
OF_COPY = 0.85
REGISTERS, SHARED, WARPS, BLOCKS = 65536, 227 * 1024, 64, 32
# (resident warps of a multiprocessor, share of its issue slots that they fill)
SHARES = ((4, 0.25), (8, 0.40), (16, 0.55), (32, 0.72), (64, 0.80))
PRODUCTS_SHARE = 0.7
PRODUCTS = frozenset(
    ("state_forward", "output_forward", "states_backward", "state_backward", "value_backward", "input_backward")
)
# flash-linear-attention 0.6.0 with compiled glue: bytes per token and model width, and the bandwidth that its kernels and the
# compiled pointwise code reach
PEER_FORWARD = ((31, 2.1e12), (13, 2.6e12))
PEER_BACKWARD = ((85, 1.67e12), (35, 2.6e12))


IN_BACKWARD: Mapping[str, str] = {"gate_forward": "gate_backward", "state_forward": "states_backward"}
"""Kernel of a forward -> its name in this table where it runs in a backward."""


@dataclass(frozen=True)
class Work:
    """A kernel's part in a pass: programs, iterations of its loop in each, bytes that it moves."""

    programs: int
    iterations: int
    bytes: float


def works(tokens: int, batch: int, heads: int, k: int, v: int, tiles: Tiles, conv_rows: int = 61) -> dict[str, Work]:
    """By the names of the stored table; 16-bit inputs."""
    narrow, wide = tokens * heads * k * 2.0, tokens * heads * v * 2.0  # one tensor of keys, one of values
    per_row = tokens * heads * 4.0
    found = {}
    for name, chunk in (("forward", tiles.chunk), ("backward", tiles.back)):
        chunks = tokens // chunk
        states, columns = chunks * heads * k * v * 2.0, -(-v // tiles.block_v)
        each, walk = chunks * heads, (columns * batch * heads, tokens // batch // chunk)
        gates = 2 * narrow + 2 * narrow + per_row
        if name == "forward":
            found["gate_forward"] = Work(each, 1, gates)
            found["state_forward"] = Work(*walk, narrow + wide + states)
            found["output_forward"] = Work(each, 1, 2 * narrow + 4 * wide + states + 2 * per_row)
            continue
        found["gate_backward"] = Work(each, 1, gates + 2 * narrow)
        found["states_backward"] = Work(*walk, narrow + wide + states)
        found["output_backward"] = Work(-(-tokens * heads // metala_rows(v)), 1, 6 * wide + 3 * per_row)
        found["state_backward"] = Work(*walk, narrow + wide + states)
        found["value_backward"] = Work(each * columns, 1, 2 * narrow + 3 * wide + states + per_row)
        found["input_backward"] = Work(each, columns, 7 * narrow + 2 * wide + 2 * states + per_row)
    d = heads * v
    found["conv_forward"] = Work(tokens // 32 * (d // 32), 1, 2 * wide)
    found["conv_backward"] = Work(-(-tokens // conv_rows) * -(-d // 256), 16, 3 * wide)
    return found


def blocks_per_processor(row: Mapping[str, Any]) -> int:
    """How many blocks of a kernel a multiprocessor holds at once."""
    registers = -(-row["registers"] // 8) * 8 * row["warps"] * 32
    return int(min(REGISTERS // registers, SHARED // (row["shared"] + 1024), WARPS // row["warps"], BLOCKS))


def issue_share(warps: float) -> float:
    """Share of the issue slots that so many resident warps fill, between the points of `SHARES`."""
    before = (0.0, 0.0)
    for point in SHARES:
        if warps <= point[0]:
            return before[1] + (point[1] - before[1]) * (warps - before[0]) / (point[0] - before[0])
        before = point
    return before[1]


def seconds(row: Mapping[str, Any], work: Work, bandwidth: float) -> tuple[float, float, int]:
    """(time of its instructions, time of its bytes at `bandwidth` bytes per second, blocks per multiprocessor)."""
    blocks = blocks_per_processor(row)
    share = issue_share(min(blocks, work.programs / PROCESSORS) * row["warps"])
    share *= PRODUCTS_SHARE if row.get("kernel") in PRODUCTS else 1.0
    instructions = (row["instructions"] + (work.iterations - 1) * row["loop"]) * row["warps"] * work.programs
    return instructions / (PROCESSORS * CLOCK * ISSUES * share), work.bytes / (OF_COPY * bandwidth), blocks


def measured_times(path: Path, width: int) -> dict[str, float]:
    """Microseconds of a kernel by its name in the table, from a result of the GPU kit at this model width."""
    rows = json.loads(path.read_text())["parts"]["kernels"]
    times = {}
    for part, names in (("metala forward", {}), ("metala backward", IN_BACKWARD), ("conv", {}), ("conv backward", {})):
        for name, microseconds, _ in rows.get(f"{part} d={width}", {}).get("kernels", ()):
            times[names.get(name, name)] = microseconds
    return times


def main() -> None:
    """Print a row per kernel, the sums, and the peer's calculated times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--table", type=Path, default=Path("benchmarks/results/kernels-aot-sm90.json"))
    parser.add_argument("--bandwidth", type=float, default=3.0, help="copy bandwidth in TB/s")
    parser.add_argument("--measured", type=Path, help="a result of the GPU kit, to compare with")
    args = parser.parse_args()
    measured = measured_times(args.measured, args.width) if args.measured else {}
    k, v = args.width // (2 * args.heads), args.width // args.heads
    table = json.loads(args.table.read_text())
    rows = {r["kernel"]: r for r in table["rows"] if r["dtype"] == "bf16" and r["shape"] in (f"{k}x{v} cut 0", "taps 4")}
    sums = {"forward": 0.0, "backward": 0.0}
    print(f"Triton {table['triton']}, {args.tokens} tokens, width {args.width}, {args.heads} heads of {k} x {v}; microseconds")
    for name, work in works(args.tokens, args.batch, args.heads, k, v, metala_cuts(k, v, 2)[0]).items():
        row = rows[name]
        issue, traffic, blocks = seconds(row, work, args.bandwidth * 1e12)
        time = max(issue, traffic)
        if not name.startswith("conv"):
            sums["forward" if name in ("gate_forward", "state_forward", "output_forward") else "backward"] += time
        print(
            f"{name:16} registers={row['registers']} spilled={row['spilled']} shared={row['shared']} warps={row['warps']} "
            f"instructions={row['instructions']} loop={row['loop']} blocks_per_sm={blocks} MB={work.bytes / 1e6:.0f} "
            f"issue={issue * 1e6:.0f} bytes={traffic * 1e6:.0f} time={time * 1e6:.0f} of_bandwidth={traffic / time:.0%}"
            + (f" measured={measured[name]:.0f}" if name in measured else "")
        )
    peers = [sum(n * args.width * args.tokens / rate for n, rate in parts) for parts in (PEER_FORWARD, PEER_BACKWARD)]
    for (name, time), peer in zip((*sums.items(), ("both", sum(sums.values()))), (*peers, sum(peers)), strict=True):
        print(f"{name}: {time * 1e6:.0f}, flash-linear-attention with compiled glue {peer * 1e6:.0f}: {peer / time:.2f} times")


if __name__ == "__main__":
    main()
