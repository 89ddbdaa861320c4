"""The page of measured speed and memory, from the JSON files of benchmarks/results; no number of it is written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tools.bench.gpu_report import compared, part_table, stored_result
from tools.reference.markdown import page, table

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
GPU = ("gpu-h200.json", "gpu-h100.json")
GPU_PARTS = ("training", "peers", "decode", "prefill")
_PASSES = ("forward", "forward+backward")
Result = Mapping[str, Any]


def _train(result: Result) -> Iterator[str]:
    shape = result["shape"]
    yield (
        f"MetaLA against a Llama of `transformers` of the same size ({shape['layers']} layers of {shape['hidden']}), a step of "
        f"{shape['tokens']:,} tokens. Linear attention gains with the length of the sequence."
    )
    headings = ("tokens per sequence", "MetaLA, tokens/s", "Llama, tokens/s", "ratio")
    names = ("metala_tokens_per_s", "llama_tokens_per_s")
    rows = result["rows"]
    yield table(headings, ([f"{r['seq_length']:,}", *(f"{r[n]:,.0f}" for n in names), f"{r['ratio']:.2f}"] for r in rows))


def _mixers(result: Result) -> Iterator[str]:
    timings = [t for t in result["timings"] if t["form"] == "torch" and not t["mixer"].endswith("operator")]
    lengths = sorted({t["length"] for t in timings})
    speed = {(t["mixer"], t["length"], t["pass"]): t["tokens_per_s"] for t in timings}
    shape = result["shape"]
    yield f"Tokens/s of one layer of width {shape['hidden']}, forward, and forward with backward."
    headings = ["mixer", *(f"{n:,} tokens, {p}" for n in lengths for p in _PASSES)]
    mixers = dict.fromkeys(t["mixer"] for t in timings)
    keys = [(n, p) for n in lengths for p in _PASSES]
    yield table(headings, ([m, *(f"{speed[m, n, p]:,.0f}" if (m, n, p) in speed else "" for n, p in keys)] for m in mixers))


def _prefill(result: Result) -> Iterator[str]:
    rows = [r for r in result["rows"] if r["sweep"] == "length" and r["form"] == "default"]
    layers, lengths = (list(dict.fromkeys(r[name] for r in rows)) for name in ("layer", "length"))
    ratio = {(r["layer"], r["length"]): r["against_softmax"] for r in rows}
    yield "Speed of one layer over a prompt, as a multiple of softmax attention's at the same length."
    columns = [f"{n:,} tokens" for n in lengths]
    yield table(["layer", *columns], ([layer, *(f"{ratio[layer, n]:.2f}" for n in lengths)] for layer in layers))


def _generation(result: Result) -> Iterator[str]:
    first = result["rows"][0]
    yield (
        f"`{result['config']}` against a Llama of the same size: {first['batch']} sequences, prompts of {first['prompt']} "
        f"tokens, {first['new']} new tokens. `model` is ours, `softmax` the Llama."
    )
    rows = ([r["model"], r["program"], f"{r['tokens_per_s']:.0f}", f"{r['bytes_per_sequence']:,}"] for r in result["rows"])
    yield table(("model", "program", "tokens/s", "bytes of state per sequence"), rows)


def _loss(result: Result) -> Iterator[str]:
    shape = result["shape"]
    yield (
        f"`loss_chunk_tokens`: LM head and loss of {shape['tokens']:,} tokens and a vocabulary of {shape['vocab']:,}, at once "
        "(0) or a block of tokens at a time."
    )
    rows = ([str(r["block"]), f"{r['processor_seconds']:.2f}", f"{r['peak_mib']:.0f}"] for r in result["rows"])
    yield table(("`loss_chunk_tokens`", "processor seconds", "peak, MiB"), rows)


def _memory(result: Result) -> Iterator[str]:
    cases = result["cases"]
    errors = sorted(abs(case["error"]) for case in cases)
    yield (
        f"Predicted against measured peak memory of a training step, {len(cases)} configurations: the median error is "
        f"{errors[len(errors) // 2]:.1%}, the largest {result['worst']:.1%}."
    )


def _startup(result: Result) -> Iterator[str]:
    yield "Seconds of a run of three steps, by launcher, and where they go."
    parts = ("launcher", "imports", "rendezvous", "engine", "first step", "end", "total")
    rows = ([r["route"], str(r["processes"]), *(f"{r[name]:.2f}" for name in parts)] for r in result["seconds"])
    yield table(("launcher", "processes", *parts), rows)


def _checkpoint(result: Result) -> Iterator[str]:
    yield f"MB/s (median) of one process, {result['state, MB']:,.0f} MB of weights, master weights and moments."
    kinds = ("save", "load, cold", "load, cached")
    medians = {kind: result[kind]["MB/s, median"] for kind in kinds}
    names = dict.fromkeys(name for kind in kinds for name in medians[kind])
    rows = ([name, *(f"{medians[kind][name]:,.0f}" if name in medians[kind] else "" for kind in kinds)] for name in names)
    yield table(("method", *kinds), rows)


def _data(result: Result) -> Iterator[str]:
    tokens, loader, index = result["tokenisation"], result["loader"], result["index"]
    rows = [
        ("tokenising, 1 worker", f"{tokens['workers_1']['tokens_per_s']:,} tokens/s"),
        ("tokenising, 2 workers", f"{tokens['workers_2']['tokens_per_s']:,} tokens/s"),
        (f"loader, samples of {loader['seq_length']:,}", f"{loader['threads_0']['tokens_per_s']:,} tokens/s"),
        (f"sample order of {index['tokens'] / 1e9:,.0f}B tokens", f"{index['seconds']:.0f} s"),
    ]
    yield table(("part", "speed"), rows)


def _communication(result: Result) -> Iterator[str]:
    large = result["large"]
    yield (
        "Collectives of one MetaLA layer per step under tensor parallelism, and MiB sent per rank at "
        f"{large['b']} x {large['s']:,} tokens of width {large['d']:,}."
    )
    rows = ([str(r["tp"]), r["layout"], r["forward"], r["backward"], f"{r['mib_3b']:,.0f}"] for r in result["rows"])
    yield table(("tensor ranks", "layout", "forward", "backward", "MiB"), rows)


# Title -> file of benchmarks/results and what is shown of it.
_CPU: Mapping[str, tuple[str, Callable[[Result], Iterator[str]]]] = {
    "Training step": ("train-cpu.json", _train),
    "Token mixers": ("mixers-cpu.json", _mixers),
    "Reading a prompt": ("prefill-cpu.json", _prefill),
    "Generation": ("generation-cpu.json", _generation),
    "Loss by blocks of tokens": ("output-loss-cpu.json", _loss),
    "Memory estimate of a dry run": ("dry-run-memory.json", _memory),
    "Start of a run": ("startup.json", _startup),
    "Checkpoints": ("checkpoint-2core.json", _checkpoint),
    "Data": ("data-cpu.json", _data),
    "Communication of tensor parallelism": ("communication.json", _communication),
}


def _gpu() -> Iterator[str]:
    for name in GPU:
        result = stored_result(RESULTS / name)
        parts = result["parts"]
        facts = {key: value for row in parts["facts"].values() for key, value in row.items()}
        yield f"## {facts['device']}"
        yield f"`benchmarks/results/{name}`: torch {facts['torch']}, Triton {facts['triton']}; `{result['command']}`."
        for part in GPU_PARTS:
            if len(parts.get(part, ())) > 1:  # a comparison needs two
                rows = compared(parts[part], parts.get("operators", {})) if part == "peers" else parts[part]
                yield "\n".join(part_table(part, rows))


def pages() -> dict[str, str]:
    """Path below docs/ -> text."""
    intro = (
        "What the commands under `tools/bench/` measured, from their JSON in `benchmarks/results/`. Rows with a star are of an "
        "earlier run than the rest of their table. [GPU measurements](gpu.md) has operators, kernels and tests; "
        "[kernels](kernels.md) explains them; `benchmarks/README.md` names every command."
    )
    blocks = [
        intro,
        *_gpu(),
        "## On a CPU",
        "Two cores, other work beside it; ratios are of programs that took turns in one run.",
    ]
    for title, (name, show) in _CPU.items():
        result = json.loads((RESULTS / name).read_text(encoding="utf-8"))
        blocks += [f"### {title}", *show(result), f"`benchmarks/results/{name}`"]
    return {"performance.md": page("Performance", "benchmarks/results", *blocks)}
