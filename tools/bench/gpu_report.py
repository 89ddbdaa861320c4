"""One JSON and one page from the rows of `tools/bench/gpu_kit.py`; needs no GPU.

    python tools/bench/gpu_report.py DIR [DIR ...] --output benchmarks/results/gpu-h200.json
    python tools/bench/gpu_report.py --page docs/gpu.md benchmarks/results/gpu-h100.json benchmarks/results/gpu-h200.json

Of rows with the same key the last folder's counts; rows that only an earlier folder has are marked on the page, since they are
those of earlier code. The page is written from stored results alone, with a table per part of each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.files import write_json
from megatron.ops.tuning import metala_cuts
from tools.bench.gpu_kit import PARTS, stored
from tools.bench.kernel_times import IN_BACKWARD, works

Rows = Mapping[str, Mapping[str, Any]]
# part -> its title and its columns: field, heading, format
_TABLES: dict[str, tuple[str, tuple[tuple[str, str, str], ...]]] = {
    "operators": (
        "Operators, bf16",
        (
            ("forward_ms", "forward, ms", ".3f"),
            ("forward_backward_ms", "forward + backward, ms", ".3f"),
            ("ms", "step, ms", ".3f"),
            ("peak_mib", "peak, MiB", ",.0f"),
        ),
    ),
    "peers": (
        "MetaLA's operator, 8 x 2,048 tokens, heads of 64 x 128, and Based's; rows named fla: flash-linear-attention 0.6.0",
        (
            ("forward_ms", "forward, ms", ".3f"),
            ("forward_backward_ms", "forward + backward, ms", ".3f"),
            ("forward_ratio", "forward, times ours", ".2f"),
            ("forward_backward_ratio", "both, times ours", ".2f"),
        ),
    ),
    "training": (
        "Optimizer steps, 2,048 tokens per row, bf16 with fp32 masters and Adam, one GPU",
        (
            ("micro_batch", "micro batch", "d"),
            ("step_ms", "step, ms", ".0f"),
            ("tokens_per_s", "tokens/s", ",.0f"),
            ("of_989_tflop_per_s", "MFU of 989 TFLOP/s", ".1%"),
            ("peak_gib", "peak, GiB", ".1f"),
        ),
    ),
    "decode": (
        "One token of a whole model",
        (("batch", "batch", "d"), ("ms", "ms", ".2f"), ("tokens_per_s", "tokens/s", ",.0f"), ("graph", "CUDA graph", "")),
    ),
    "prefill": ("Prefill of a whole model", (("ms", "ms", ".1f"), ("tokens_per_s", "tokens/s", ",.0f"))),
    "cuts": ("Block sizes", (("forward_ms", "forward, ms", ".3f"), ("backward_ms", "backward, ms", ".3f"))),
}


def collect(folders: Iterable[Path]) -> dict[str, dict[str, dict[str, Any]]]:
    """part -> key -> row with the number of its run, of all parts that have rows."""
    parts: dict[str, dict[str, dict[str, Any]]] = {}
    for run, folder in enumerate(folders, 1):
        for part in PARTS:
            for row in stored(folder / f"{part}.jsonl"):
                parts.setdefault(part, {})[str(row["key"])] = {**row, "run": run}
    return parts


def table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (headings, ["---"] * len(headings), *lines)]


def _cell(row: Mapping[str, Any], field: str, form: str) -> str:
    value = row.get(field)
    return "" if value is None else format(value, form) if form else str(value)


def part_table(part: str, rows: Rows) -> list[str]:
    """Heading and table of a part; what failed says why."""
    title, columns = _TABLES[part]
    last = max(row["run"] for row in rows.values())
    lines = [
        [key, *([f"failed: {row['error'][:90]}"] + [""] * (len(columns) - 1))]
        if "error" in row
        else [key if row["run"] == last else f"{key} *", *(_cell(row, field, form) for field, _, form in columns)]
        for key, row in rows.items()
    ]
    return [f"### {title}", "", *table(["", *(heading for _, heading, _ in columns)], lines), ""]


def compared(rows: Rows, operators: Rows) -> Rows:
    """The peers' rows with their times as multiples of ours at the same shape."""
    result = {}
    for key, row in rows.items():
        name, _, shape = key.partition("parallel_based ")
        ours = operators.get(f"taylor triton {shape}") if shape else rows.get(f"ours {' '.join(name.split()[-2:])}")
        times = ("forward", "forward_backward")
        ratios = {f"{n}_ratio": row[f"{n}_ms"] / ours[f"{n}_ms"] for n in times if ours and f"{n}_ms" in row}
        result[key] = {**row, **ratios}
    return result


def changes(cuts: Sequence[str]) -> dict[str, str]:
    """Each cut's name -> the first one whole, of the others what differs from it."""
    first = cuts[0].rstrip(")").partition("(")[2].split(", ")
    return {cut: ", ".join(f for f in cut.rstrip(")").partition("(")[2].split(", ") if f not in first) or cut for cut in cuts}


def test_lines(rows: Rows) -> list[str]:
    """How many tests passed, and the names of the others."""
    outcomes = {key: row for key, row in rows.items() if "seconds" in row}
    failed = [f"`{key.rpartition('/')[2]}`" for key, row in outcomes.items() if "error" in row]
    passed = sum(row.get("outcome") == "passed" for row in outcomes.values())
    names = f"; failed, with the code of that day: {', '.join(failed)}" if failed else ""
    return ["### Tests marked `gpu`", "", f"{passed} of {len(outcomes)} passed{names}.", ""]


def moved_bytes(key: str, row: Mapping[str, Any]) -> dict[str, float]:
    """Bytes that each kernel of a row moves, of MetaLA's by today's table: of others the share was stored with the row."""
    passes = {"metala forward": {}, "metala backward": IN_BACKWARD}
    name, _, width = key.partition(" d=")
    if name not in passes or not width:
        return {}
    table = {kernel: w.bytes for kernel, w in works(16384, 8, int(width) // 128, 64, 128, metala_cuts(64, 128, 2)[0]).items()}
    return {kernel: table[passes[name].get(kernel, kernel)] for kernel, *_ in row["kernels"] if kernel in table}


def kernel_table(rows: Rows, copy: float) -> list[str]:
    """Each kernel by itself, in passes over 16,384 tokens; `copy` is the copy bandwidth in TB/s."""
    lines = []
    for key, row in rows.items():
        moved = moved_bytes(key, row)
        for name, microseconds, _ in row.get("kernels", ()):
            share = moved[name] / microseconds / copy / 1e6 if name in moved else row["of_copy_bandwidth"].get(name)
            if "::" not in name and not name.startswith(("Mem", "void")):
                lines.append([key, f"`{name}`", f"{microseconds:.0f}", "" if share is None else f"{share:.0%}"])
    return ["### Kernels", "", *table(["pass", "kernel", "microseconds", "of the copy bandwidth"], lines), ""]


def accuracy_table(parts: Mapping[str, Rows]) -> list[str]:
    """The worst relative error of outputs and of gradients, per dtype, over the cases."""
    lines = []
    for part, rows in parts.items():
        good = {key: row for key, row in rows.items() if "error" not in row}
        if not part.startswith("correctness") or not good:
            continue
        errors = {
            kind: max((row[name], f"{key}, {name}") for key, row in good.items() for name in names if name in row)
            for kind, names in (("outputs", ("y", "final")), ("gradients", ("dq", "dz", "dv", "dg", "dw", "dstate")))
        }
        failed = ", ".join(key for key in rows if key not in good)
        worst = [f"{value:.1e} ({where})" for value, where in errors.values()]
        lines.append([part.partition("-")[2], str(len(good)), *worst, failed])
    head = ["dtype", "cases", "worst output", "worst gradient", "failed"]
    return ["### MetaLA against the recurrence in fp64", "", *table(head, lines), ""]


def section(result: Mapping[str, Any]) -> list[str]:
    """The Markdown lines of a result."""
    parts = result["parts"]
    facts = {name: value for row in parts.get("facts", {}).values() for name, value in row.items()}
    lines = [
        f"## {facts.get('device')}",
        "",
        f"`{result['file']}`: torch {facts.get('torch')}, Triton {facts.get('triton')}. "
        f"Copy bandwidth {facts.get('tb_per_s', 0):.2f} TB/s, "
        f"bf16 product of 8,192 x 8,192 matrices {facts.get('tflop_per_s', 0):.0f} TFLOP/s.",
        "",
    ]
    for part, rows in parts.items():
        if part == "peers":
            lines += part_table(part, compared(rows, parts.get("operators", {})))
        elif part == "cuts":
            lines += part_table(part, {change: rows[key] for key, change in changes(list(rows)).items()})
        elif part in _TABLES:
            lines += part_table(part, rows)
        elif part == "kernels":
            lines += kernel_table(rows, facts["tb_per_s"])
        elif part == "tests" and any("seconds" in row for row in rows.values()):
            lines += test_lines(rows)
    if any(part.startswith("correctness") for part in parts):
        lines += accuracy_table(parts)
    return lines


def page(results: Iterable[Mapping[str, Any]]) -> str:
    """The Markdown page of these results."""
    lines = [
        "# On a GPU",
        "",
        "Written by `tools/bench/gpu_report.py`, a section per device.",
        "",
        "Times of operators and kernels are those of the device, without launches and with an empty L2 cache. Where the sum "
        "of an operator's kernels is less than its time, the host was late with the launches. Training steps are on the clock "
        "of the host. Rows with a star are of an earlier run than the rest of their table; [kernels.md](kernels.md) says which "
        "parts were measured with which kernels.",
        "",
    ]
    for result in results:
        lines += section(result)
    return "\n".join(lines).rstrip() + "\n"


def stored_result(path: Path) -> dict[str, Any]:
    """A result that `--output` wrote."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        sys.exit(f"error: cannot read {path}\n  why: {error}")
    if not isinstance(result, dict) or "facts" not in result.get("parts", {}):
        sys.exit(f"error: {path} is no result of the GPU kit with its part 'facts'\n  try: one that --output wrote")
    return dict(result)


def main() -> None:
    """Collect and store, or write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "inputs", type=Path, nargs="+", help="folders of the kit, later rows replacing earlier; or stored results"
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", type=Path, help="store the folders' rows in this JSON")
    target.add_argument("--page", type=Path, help="write this page from stored results")
    args = parser.parse_args()
    if args.page:
        args.page.write_text(page([stored_result(path) for path in args.inputs]))
    else:
        parts = collect(args.inputs)
        if not parts:
            sys.exit(f"error: no rows of the GPU kit in {', '.join(map(str, args.inputs))}")
        result = {"benchmark": "gpu_kit", "command": "python tools/bench/gpu_kit.py", "file": str(args.output), "parts": parts}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, result)
    print(f"written: {args.output or args.page}")


if __name__ == "__main__":
    main()
