"""One JSON and one page from the rows of `tools/bench/gpu_kit.py`; needs no GPU.

    python tools/bench/gpu_report.py DIR [DIR ...] --output benchmarks/results/gpu-h200.json [--page docs/gpu.md]

Of rows with the same key the last folder's counts. The page has a table per part, and is written from the JSON alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.files import write_json
from tools.bench.gpu_kit import PARTS, stored

Rows = Mapping[str, Mapping[str, Any]]
# part -> its title and its columns: field, heading, format
_TABLES: dict[str, tuple[str, tuple[tuple[str, str, str], ...]]] = {
    "operators": (
        "Operators, bf16",
        (
            ("forward_ms", "forward, ms", ".3f"),
            ("forward_backward_ms", "forward + backward, ms", ".3f"),
            ("peak_mib", "peak, MiB", ",.0f"),
        ),
    ),
    "peers": (
        "MetaLA's operator beside flash-linear-attention 0.6.0, 8 x 2,048 tokens, heads of 64 x 128",
        (("forward_ms", "forward, ms", ".3f"), ("forward_backward_ms", "forward + backward, ms", ".3f")),
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
    """part -> key -> row, of all parts that have rows."""
    parts: dict[str, dict[str, dict[str, Any]]] = {}
    for folder in folders:
        for part in PARTS:
            for row in stored(folder / f"{part}.jsonl"):
                parts.setdefault(part, {})[str(row["key"])] = {name: value for name, value in row.items() if name != "key"}
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
    lines = [
        [key, *([f"failed: {row['error'][:90]}"] + [""] * (len(columns) - 1))]
        if "error" in row
        else [key, *(_cell(row, field, form) for field, _, form in columns)]
        for key, row in rows.items()
    ]
    return [f"## {title}", "", *table(["", *(heading for _, heading, _ in columns)], lines), ""]


def kernel_table(rows: Rows) -> list[str]:
    """Each kernel by itself."""
    lines = []
    for key, row in rows.items():
        for name, microseconds, _ in row.get("kernels", ()):
            if name in row["of_copy_bandwidth"]:
                lines.append([key, f"`{name}`", f"{microseconds:.0f}", f"{row['of_copy_bandwidth'][name]:.0%}"])
    return ["## Kernels", "", *table(["pass", "kernel", "microseconds", "of the copy bandwidth"], lines), ""]


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
    return ["## MetaLA against the recurrence in fp64", "", *table(head, lines), ""]


def page(result: Mapping[str, Any]) -> str:
    """The Markdown page of a result."""
    parts = result["parts"]
    facts = {name: value for row in parts.get("facts", {}).values() for name, value in row.items()}
    lines = [
        "# On a GPU",
        "",
        f"Written by `tools/bench/gpu_report.py` from `{result['file']}`.",
        "",
        f"{facts.get('device')}, torch {facts.get('torch')}, Triton {facts.get('triton')}. "
        f"Copy bandwidth {facts.get('tb_per_s', 0):.2f} TB/s, "
        f"bf16 product of 8,192 x 8,192 matrices {facts.get('tflop_per_s', 0):.0f} TFLOP/s. Times of operators and kernels are "
        "those of the device, without launches and with an empty L2 cache; training steps are on the clock of the host.",
        "",
    ]
    for part, rows in parts.items():
        if part in _TABLES:
            lines += part_table(part, rows)
        elif part == "kernels":
            lines += kernel_table(rows)
    if any(part.startswith("correctness") for part in parts):
        lines += accuracy_table(parts)
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Collect, store, write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folders", type=Path, nargs="+", help="results of the kit; later ones replace rows of earlier ones")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--page", type=Path)
    args = parser.parse_args()
    parts = collect(args.folders)
    if not parts:
        sys.exit(f"error: no rows of the GPU kit in {', '.join(map(str, args.folders))}")
    result = {"benchmark": "gpu_kit", "command": "python tools/bench/gpu_kit.py", "file": str(args.output), "parts": parts}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, result)
    if args.page:
        args.page.write_text(page(result))
    print(f"written: {args.output}{f' and {args.page}' if args.page else ''}")


if __name__ == "__main__":
    main()
