"""Compile time on a CPU: `torch.compile` of forward and of a training step, for a toy model of each mixer, and speed of both.

    python tools/bench/compile_cpu.py [--kinds metala based ...] [--backend inductor] [--output benchmarks/results/NAME.json]

One line of JSON per model: graph breaks (0 when the whole step is one graph), seconds to the first compiled forward and to the
first compiled step (forward, loss, backward), largest relative difference of the loss and of the gradients from the eager
ones, and the median milliseconds of an eager and of a compiled step. The compiler's cache on disk is off.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from megatron.files import write_json
from megatron.model.build import build_model
from megatron.model.config import ModelConfig
from megatron.model.loss import token_loss

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


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result of `run()`."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def step_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The loss of tokens [b, s + 1] as a function that can be compiled."""
    return lambda tokens: token_loss(model(tokens[:, :-1])[0], tokens[:, 1:])


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    """Gradients of all parameters in fp64."""
    model.zero_grad()
    loss.backward()
    return [p.grad.double() for p in model.parameters() if p.grad is not None]


def relative(got: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of `exact`."""
    return float((got - exact).norm() / exact.norm().clamp_min(1e-30))


def median_ms(run: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds of a call."""
    return round(1000 * statistics.median(timed(run)[0] for _ in range(repeats)), 2)


def measure(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row: see the head of this file."""
    from torch._dynamo.utils import counters

    model = toy(kind)
    tokens = torch.randint(0, TOY.vocab_size, (args.batch, args.length + 1), generator=torch.Generator().manual_seed(0))
    step, options = step_of(model), {"backend": args.backend, "fullgraph": not args.allow_breaks}
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad():
        forward_s, _ = timed(lambda: torch.compile(model, **options)(tokens[:, :-1]))
    exact_loss = step(tokens).detach().double()
    exact = gradients(model, step(tokens))
    compiled = torch.compile(step, **options)
    step_s, loss = timed(lambda: compiled(tokens))
    back_s, got = timed(lambda: gradients(model, loss))
    return {
        "kind": kind,
        "length": args.length,
        "graph_breaks": sum(counters["graph_break"].values()),
        "forward_compile_s": round(forward_s, 1),
        "step_compile_s": round(step_s + back_s, 1),
        "loss_difference": relative(loss.detach().double(), exact_loss),
        "gradient_difference": max(relative(a, b) for a, b in zip(got, exact, strict=True)),
        "eager_step_ms": median_ms(lambda: step(tokens).backward(), args.repeats),
        "compiled_step_ms": median_ms(lambda: compiled(tokens).backward(), args.repeats),
    }


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
        rows.append(measure(kind, args))
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "benchmark": "compile_cpu",
        "device": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "command": " ".join(["python", "tools/bench/compile_cpu.py", *sys.argv[1:]]),
        "rows": rows,
    }
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, result)
        print(f"written: {args.output}")


if __name__ == "__main__":
    main()
