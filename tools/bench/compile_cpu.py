"""Compile time on a CPU: `torch.compile` of forward and of a training step, for a toy model of each mixer, and speed of both.

    python tools/bench/compile_cpu.py [--kinds metala based ...] [--backend inductor] [--output benchmarks/results/NAME.json]

One line of JSON per model: graph breaks (0 when the whole step is one graph); seconds to the first compiled forward and to the
first compiled step (forward, loss, backward), by the clock and of CPU time with the C++ compiler's, which a busy machine does
not stretch; the largest relative distance of the compiled gradients from the eager ones, and of both from those in fp64; the
median milliseconds of an eager and of a compiled step, alternating. Each model has a process and an empty cache of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from megatron.model.build import build_model
from megatron.model.config import ModelConfig
from megatron.model.loss import token_loss
from tools.bench.cpu_result import save_result

TOY = ModelConfig(vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, mlp_width=48, layer_types=("metala", "metala"))
WINDOW: Mapping[str, Mapping[str, Any]] = {"sliding": {"window": 5}}
KINDS: Mapping[str, Mapping[str, Any]] = {
    "metala": {},
    "metala_untied": {"tie_embeddings": False},
    "mamba": {"layer_types": ("mamba", "mamba"), "mlp": "none", "norm": "rmsnorm"},
    "based": {
        "layer_types": ("base_conv", "based", "sliding", "base_conv"),
        "num_layers": 4,
        "norm": "rmsnorm",
        "residual_fp32": True,
        "layer_options": {"based": {"feature_width": 4}, **WINDOW},
    },
    "jrt": {"layer_types": ("jrt", "jrt"), "layer_options": {"jrt": {"feature_width": 4, "prefix_length": 8}}},
    "alibi": {"layer_types": ("alibi", "alibi")},
    "hybrid": {"layer_types": ("metala", "alibi", "mamba", "sliding"), "num_layers": 4, "layer_options": WINDOW},
}


def toy(kind: str) -> nn.Module:
    """The model of a kind with random parameters, none so small that its gradient is rounding alone."""
    model, generator = build_model(replace(TOY, **KINDS[kind])), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.25 if p.dim() > 1 else 0.2, generator=generator)
    return model


def cpu_seconds() -> float:
    """CPU time of this process and of the compilers that it started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def timed(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds, CPU seconds and result of `run()`."""
    start, cpu = time.perf_counter(), cpu_seconds()
    result = run()
    return time.perf_counter() - start, cpu_seconds() - cpu, result


def step_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The loss of tokens [b, s + 1] as a function that can be compiled."""
    return lambda tokens: token_loss(model(tokens[:, :-1])[0], tokens[:, 1:])


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    """Gradients of all parameters in fp64."""
    model.zero_grad()
    loss.backward()
    return [p.grad.double() for p in model.parameters() if p.grad is not None]


def distance(actual: list[Tensor], exact: list[Tensor]) -> float:
    """Largest norm of a difference over the norm of what is exact."""
    return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(actual, exact, strict=True))


def alternating_ms(runs: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Median milliseconds of a call of each, taken in turn."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for taken, run in zip(times, runs, strict=True):
            taken.append(1000 * timed(run)[0])
    return [round(statistics.median(taken), 2) for taken in times]


def measure(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row: see the head of this file."""
    from torch._dynamo.utils import counters

    model = toy(kind)
    tokens = torch.randint(0, TOY.vocab_size, (args.batch, args.length + 1), generator=torch.Generator().manual_seed(0))
    step, options = step_of(model), {"backend": args.backend, "fullgraph": not args.allow_breaks}
    with torch.no_grad():
        forward_s, forward_cpu_s, _ = timed(lambda: torch.compile(model, **options)(tokens[:, :-1]))
    double = copy.deepcopy(model).double()
    exact, eager = gradients(double, step_of(double)(tokens)), gradients(model, step(tokens))
    compiled = torch.compile(step, **options)
    step_s, step_cpu_s, actual = timed(lambda: gradients(model, compiled(tokens)))
    steps = [lambda: step(tokens).backward(), lambda: compiled(tokens).backward()]
    eager_ms, compiled_ms = alternating_ms(steps, args.repeats)
    return {
        "kind": kind,
        "length": args.length,
        "graph_breaks": sum(counters["graph_break"].values()),
        "forward_compile_s": round(forward_s, 1),
        "forward_compile_cpu_s": round(forward_cpu_s, 1),
        "step_compile_s": round(step_s, 1),
        "step_compile_cpu_s": round(step_cpu_s, 1),
        "compiled_from_eager": distance(actual, eager),
        "eager_from_fp64": distance(eager, exact),
        "compiled_from_fp64": distance(actual, exact),
        "eager_step_ms": eager_ms,
        "compiled_step_ms": compiled_ms,
    }


def measure_alone(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a process of its own, which finds nothing compiled."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(measure, (kind, args))


def main() -> None:
    """Parse, measure, print, store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--allow-breaks", action="store_true", help="count graph breaks instead of refusing them")
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    rows = []
    for kind in args.kinds:
        rows.append(measure_alone(kind, args))
        print(json.dumps(rows[-1]), flush=True)
    save_result("compile_cpu", args.output, rows)


if __name__ == "__main__":
    main()
