"""Time to read a prompt, in the shape of JRT's Table 5: one layer of each kind over batch at one length, and over length.

    python tools/bench/prefill.py [--hidden 256] [--heads 4] [--batches 1 2 4 8] [--length 2048] [--lengths 512 ... 8192]
        [--output benchmarks/results/prefill-cpu.json]

The layer is run as a server runs it: from an empty state, which it fills. Rows: softmax (torch's SDPA), Based, JRT whose
prefix is half of the prompt, MetaLA, and with `--reference` the quadratic forms of Based and JRT. Weights and inputs are drawn;
repeats of all take turns and medians count. On a CPU it is processor time, so that other work on the machine does not count. A
PNG beside the JSON shows both sweeps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from megatron.engine.build import local_device
from megatron.engine.cpu import tune_cpu
from megatron.layers.base import Context, Layer, inputs_of
from megatron.registry import layer_class
from tools.bench.cpu_result import save_result

KINDS = {"softmax": "global", "based": "based", "jrt": "jrt", "metala": "metala"}
QUADRATIC = ("based", "jrt")


def layers(args: argparse.Namespace, device: torch.device) -> dict[str, Layer]:
    """Kind -> the layer with drawn weights."""
    made = {}
    for kind, name in KINDS.items():
        layer: Layer = layer_class(name).build({"hidden_size": args.hidden, "num_heads": args.heads}, {})
        for p in layer.parameters():
            nn.init.normal_(p, 0.0, 0.02)
        made[kind] = layer.to(device).eval()
    return made


def shapes(args: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    """(sweep, batch, length)."""
    yield from (("batch", batch, args.length) for batch in args.batches)
    yield from (("length", 1, length) for length in args.lengths)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per sweep, shape, kind and form."""
    device = local_device(0)
    made, rows = layers(args, device), []
    for sweep, batch, length in shapes(args):
        x = torch.randn(batch, length, args.hidden, device=device)
        forms = [(kind, "auto") for kind in KINDS]
        if args.reference and batch * length <= args.reference:
            forms += [(kind, "reference") for kind in QUADRATIC]
        times: dict[tuple[str, str], list[float]] = {form: [] for form in forms}
        for repeat in range(args.repeats + 1):
            for kind, backend in forms:
                spent = seconds(made[kind], x, backend, length // 2 if kind == "jrt" else None)
                times[kind, backend] += [spent] if repeat else []  # the first of each warms up
        softmax = statistics.median(times["softmax", "auto"])
        for (kind, backend), values in times.items():
            middle = statistics.median(values)
            form = "quadratic" if backend == "reference" else "default"
            row = {"sweep": sweep, "batch": batch, "length": length, "layer": kind, "form": form}
            row |= {"ms": round(1e3 * middle, 2), "tokens_per_s": round(batch * length / middle)}
            rows.append(row | {"against_softmax": round(softmax / middle, 3)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def seconds(layer: Layer, x: torch.Tensor, backend: str, prefix: int | None) -> float:
    """Of one pass over x [b, s, d] that fills an empty state: processor time on a CPU, else as the clock says."""
    ctx = Context(backend=backend, inputs=inputs_of([layer], {"prefix_length": prefix}))
    clock = time.perf_counter if x.is_cuda else time.process_time
    with torch.inference_mode():
        start = clock()
        layer(x, ctx, layer.init_state(len(x), x.dtype, x.device))
        if x.is_cuda:
            torch.cuda.synchronize()
        return clock() - start


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Two panels: milliseconds over batch and over length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    for panel, sweep in zip(panels, ("batch", "length"), strict=True):
        mine = [r for r in rows if r["sweep"] == sweep]
        for kind, form in dict.fromkeys((r["layer"], r["form"]) for r in mine):
            line = [r for r in mine if (r["layer"], r["form"]) == (kind, form)]
            style = {"color": f"C{list(KINDS).index(kind)}", "linestyle": "--" if form == "quadratic" else "-", "marker": "o"}
            label = kind if form == "default" else f"{kind}, quadratic"
            panel.plot([r[sweep] for r in line], [r["ms"] for r in line], label=label, **style)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        other = "length" if sweep == "batch" else "batch"
        panel.set_xlabel(f"{sweep}, at {other} {mine[0][other]}")
        panel.set_ylabel("ms for the prompt")
        panel.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--length", type=int, default=2048, help="of the sweep over the batch")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--reference", type=int, default=0, help="quadratic forms as well, up to so many tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    tune_cpu()
    rows = measure(args)
    shape = {"hidden": args.hidden, "heads": args.heads}
    save_result("prefill", args.output, rows, shape=shape)
    if args.output is not None:
        plot(rows, args.output.with_suffix(".png"), f"one layer of width {args.hidden}, {args.heads} heads")


if __name__ == "__main__":
    main()
