"""Every token mixer on this CPU: tokens/s forward and forward + backward, and peak memory, against three others in one run.

    python tools/bench/mixers_cpu.py [--lengths 2048 4096 8192] [--fla FOLDER] [--output benchmarks/results/mixers-cpu.json]

One layer each, projections included, fp32, one row of tokens. Compared with (a) the same layer by its reference path
(quadratic, or token by token for MetaLA and Mamba), up to `--reference-limit` tokens; (b) the softmax layer of the same width,
which is torch's SDPA; (c) flash-linear-attention's plain PyTorch forms of the operator alone, where `--fla` names a folder that
holds its `fla/ops` (`pip install --no-deps --target FOLDER fla-core`). Repeats of all take turns, so that a busy machine slows
all; medians count. Memory is the peak of the resident set over one forward + backward in a process of its own, less what was
resident before (Linux: the peak is reset through /proc).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from megatron.engine.cpu import tune_cpu
from megatron.files import write_json
from megatron.layers.base import Context, Layer
from megatron.ops.metala import decay_and_key
from megatron.ops.taylor import taylor
from megatron.registry import layer_class

MIXERS = ("metala", "based", "jrt", "base_conv", "sliding", "mamba")
SOFTMAX = "global"
FEATURE = 16


def layer_of(name: str, args: argparse.Namespace, length: int) -> Layer:
    """The layer with drawn parameters; JRT reads half of the text in both directions, as in its own benchmark."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"jrt": {"prefix_length": length // 2}, "sliding": {"window": 128}}.get(name, {})
    layer: Layer = layer_class(name).build({"hidden_size": args.hidden, "num_heads": args.heads}, options)
    for p in layer.parameters():
        nn.init.normal_(p, 0.0, 0.02)
    return layer


def passes(run: Callable[[], Tensor], leaf: Tensor) -> dict[str, Callable[[], None]]:
    """forward alone, and forward + backward to `leaf` and the parameters."""

    def forward() -> None:
        with torch.no_grad():
            run()

    def both() -> None:
        leaf.grad = None
        y = run()
        y.backward(torch.ones_like(y))

    return {"forward": forward, "forward+backward": both}


def layer_cases(args: argparse.Namespace, length: int) -> Iterator[tuple[str, str, dict[str, Callable[[], None]]]]:
    """(mixer, form, passes) of every layer and its reference."""
    x = torch.randn(1, length, args.hidden, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for name in (SOFTMAX, *MIXERS):
        layer = layer_of(name, args, length)
        forms = ["torch"] if name == SOFTMAX or length > args.reference_limit else ["torch", "reference"]
        for form in forms:

            def run(layer: Layer = layer, form: str = form) -> Tensor:
                return layer(x, Context(backend=form))[0]

            yield name, form, passes(run, x)


def fla_function(folder: Path, operator: str, name: str) -> Callable[..., Any]:
    """One plain function of flash-linear-attention, read from its file alone: the package itself wants a GPU."""
    path = folder / "fla" / "ops" / operator / "naive.py"
    spec = importlib.util.spec_from_file_location(f"fla_{operator}_naive", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def operator_cases(args: argparse.Namespace, length: int) -> Iterator[tuple[str, str, dict[str, Callable[[], None]]]]:
    """The operators without projections: ours, flash-linear-attention's, and SDPA, on tensors of the same heads."""
    h, wide = args.heads, args.hidden // args.heads
    g = torch.Generator().manual_seed(2)
    q, k = (torch.randn(1, length, h, FEATURE, generator=g).requires_grad_() for _ in range(2))
    v, z = (torch.randn(1, length, h, n, generator=g).requires_grad_() for n in (wide, wide // 2))
    q2 = torch.randn(1, length, h, wide // 2, generator=g).requires_grad_()
    full = [torch.randn(1, h, length, wide, generator=g).requires_grad_() for _ in range(3)]

    def sdpa() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(full[0], full[1], full[2], is_causal=True)

    yield "sdpa operator", "torch", passes(sdpa, full[0])
    yield "based operator", "torch", passes(lambda: taylor(q, k, v)[0], q)
    if args.fla is None:
        return
    heads_first = [t.detach().transpose(1, 2).contiguous().requires_grad_() for t in (q, k, v)]
    chunk = fla_function(args.fla, "based", "naive_chunk_based")
    yield "based operator", "fla chunk", passes(lambda: chunk(*heads_first), heads_first[0])
    if length <= args.reference_limit:
        quadratic = fla_function(args.fla, "based", "naive_parallel_based")
        yield "based operator", "fla quadratic", passes(lambda: quadratic(*heads_first), heads_first[0])
        recurrent = fla_function(args.fla, "gla", "naive_recurrent_gla")

        def gla() -> Tensor:
            decay, key = decay_and_key(z)
            return recurrent(q2, key, v, decay)[0]

        yield "metala operator", "fla recurrent", passes(gla, z)
        from megatron.ops.scan.chunk import scan_chunked

        def ours() -> Tensor:
            decay, key = decay_and_key(z)
            return scan_chunked(q2, key, v, decay, scale=(wide // 2) ** -0.5)[0]

        yield "metala operator", "torch", passes(ours, z)


def timings(args: argparse.Namespace, length: int) -> list[dict[str, Any]]:
    """A row per mixer, form and pass at one length, with its ratios."""
    cases = [*layer_cases(args, length), *operator_cases(args, length)]
    times: dict[tuple[str, str, str], list[float]] = {}
    for repeat in range(args.repeats + 1):
        for name, form, both in cases:
            for kind, run in both.items():
                start = time.perf_counter()
                run()
                if repeat:  # the first of each warms up
                    times.setdefault((name, form, kind), []).append(time.perf_counter() - start)
    speed = {key: length / statistics.median(values) for key, values in times.items()}
    rows = []
    for (name, form, kind), value in speed.items():
        row: dict[str, Any] = {"length": length, "mixer": name, "form": form, "pass": kind, "tokens_per_s": round(value, 1)}
        softmax = ("sdpa operator" if "operator" in name else SOFTMAX, "torch", kind)
        row["against_sdpa"] = round(value / speed[softmax], 3)
        if form == "torch":
            others = {f: v for (n, f, kd), v in speed.items() if n == name and kd == kind and f != "torch"}
            row |= {f"against_{other.replace(' ', '_')}": round(value / v, 3) for other, v in others.items()}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def peak_of_one(args: argparse.Namespace) -> None:
    """Runs in a process of its own: the growth of its peak resident set over one forward + backward, in MiB."""
    name, form, length = args.peak[0], args.peak[1], int(args.peak[2])
    layer = layer_of(name, args, length)
    small = torch.randn(1, 64, args.hidden, requires_grad=True)
    layer(small, Context(backend=form))[0].sum().backward()  # libraries load and make their buffers
    x = torch.randn(1, length, args.hidden, requires_grad=True)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = resident("VmRSS")
    layer(x, Context(backend=form))[0].sum().backward()
    print(round((resident("VmHWM") - before) / 1024, 1))


def resident(field: str) -> int:
    """A field of /proc/self/status in KiB: VmRSS is what is resident, VmHWM its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory of every layer at every length; of quadratic references up to the limit."""
    rows = []
    for length in args.memory_lengths:
        for name in (SOFTMAX, *MIXERS):
            quadratic = name in ("based", "jrt") and length <= 2 * args.reference_limit
            for form in ("torch", "reference") if quadratic else ("torch",):
                command = [sys.executable, __file__, "--hidden", str(args.hidden), "--heads", str(args.heads)]
                command += ["--peak", name, form, str(length)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                rows.append({"length": length, "mixer": name, "form": form, "peak_mib": float(done.stdout.split()[-1])})
                print(json.dumps(rows[-1]), flush=True)
    return rows


def plot(result: dict[str, Any], path: Path) -> None:
    """Two panels over the length: tokens/s of forward + backward, and memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for panel, rows, key in ((left, result["timings"], "tokens_per_s"), (right, result["memory"], "peak_mib")):
        rows = [r for r in rows if r.get("pass", "forward+backward") == "forward+backward" and "operator" not in r["mixer"]]
        for name, form in dict.fromkeys((r["mixer"], r["form"]) for r in rows):
            mine = [r for r in rows if (r["mixer"], r["form"]) == (name, form)]
            label = "softmax (SDPA)" if name == SOFTMAX else name if form == "torch" else f"{name}, reference"
            colour = "black" if name == SOFTMAX else f"C{MIXERS.index(name)}"
            style = {"linestyle": "--" if form != "torch" else "-", "color": colour, "marker": "o" if form == "torch" else "x"}
            panel.plot([r["length"] for r in mine], [r[key] for r in mine], label=label, **style)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel("tokens")
    left.set_ylabel("tokens/s, forward + backward")
    right.set_ylabel("peak memory of forward + backward, MiB")
    left.legend(fontsize=6)
    right.legend(fontsize=6)
    figure.suptitle(f"one layer of width {result['shape']['hidden']}, {result['device']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)


def main() -> None:
    """Parse, run, print, store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--memory-lengths", type=int, nargs="*", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--reference-limit", type=int, default=2048, help="longest text for slow forms; twice that for memory")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--fla", type=Path, default=None, help="folder that holds flash-linear-attention's fla/ops")
    parser.add_argument("--output", type=Path, default=None, help="JSON file; the plot is written next to it")
    parser.add_argument("--peak", nargs=3, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    tune_cpu()
    if args.peak:
        peak_of_one(args)
        return
    result: dict[str, Any] = {
        "benchmark": "mixers_cpu",
        "device": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "load_average": [round(x, 1) for x in os.getloadavg()],
        "command": " ".join(["python", "tools/bench/mixers_cpu.py", *sys.argv[1:]]),
        "shape": {"hidden": args.hidden, "heads": args.heads, "batch": 1, "feature_width": FEATURE},
        "timings": [row for length in args.lengths for row in timings(args, length)],
        "memory": memory(args),
    }
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, result)
        plot(result, args.output.with_suffix(".png"))
        print(f"written: {args.output} and {args.output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
