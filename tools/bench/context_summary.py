"""Summaries of context parallelism on one core: autograd through plain formulas against the hand-written backward.

    python tools/bench/context_summary.py [--tokens 4096] [--hidden 512] [--heads 4] [--output FILE.json]

What a shard does beyond a layer's usual pass is its summary, forward and backward. The time of each form is compared with
that of the layer's operator, which runs in between: median processor time, all in turn in one process. The plain Taylor form
keeps the features of all tokens for its backward, the hand-written one recomputes them; Mamba's summary is its scan once more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from megatron.engine.cpu import tune_cpu
from megatron.ops.metala import decay_and_key, metala
from megatron.ops.metala.summary import metala_summary
from megatron.ops.summary.taylor import taylor_summary
from megatron.ops.taylor import taylor
from megatron.ops.taylor.features import TaylorMap
from tools.bench.cpu_result import save_result

Results = tuple[Tensor, ...]
Forms = tuple[dict[str, Tensor], Callable[..., Results], Callable[..., Results], Callable[..., Results]]


def _behind(x: Tensor) -> Tensor:
    """Sums over the tokens behind each token, from the right."""
    return x.flip(1).cumsum(1).flip(1) - x


def metala_forms(tokens: int, d: int, h: int) -> Forms:
    """Inputs; operator, plain and hand-written summary."""
    k, v = d // (2 * h), d // h
    x = {"q": torch.randn(1, tokens, h, k), "z": torch.randn(1, tokens, h, k) + 2}
    x |= {"v": torch.randn(1, tokens, h, v), "g": torch.randn(1, tokens, h, v), "w": torch.randn(h, k)}

    def plain(z: Tensor, v: Tensor, **_: Tensor) -> Results:
        log_decay, key = decay_and_key(z)
        state = torch.einsum("bshk,bshv->bhkv", key * _behind(log_decay).exp(), v)
        return state, log_decay.sum(1).exp()

    return x, lambda **x: metala(**x), plain, lambda z, v, **_: metala_summary(z, v)


def taylor_forms(tokens: int, d: int, h: int) -> Forms:
    """As `metala_forms`; feature width 16."""
    x = {name: torch.randn(1, tokens, h, 16) for name in ("q", "k")} | {"v": torch.randn(1, tokens, h, d // h)}

    def plain(k: Tensor, v: Tensor, **_: Tensor) -> Results:
        columns = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        return (torch.einsum("bshe,bshv->bhev", TaylorMap.apply(k * 0.5), columns),)  # 16^-1/4

    return x, lambda **x: taylor(**x), plain, lambda k, v, **_: taylor_summary(k, v)[:1]


FORMS: dict[str, Callable[[int, int, int], Forms]] = {"metala": metala_forms, "taylor": taylor_forms}


def seconds(form: Callable[..., Results], inputs: dict[str, Tensor], last: int) -> float:
    """Processor time of forward and backward through the first `last` results."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    start = time.process_time()
    results = form(**leaves)[:last]
    torch.autograd.grad(torch.stack([r.sum() for r in results]).sum(), list(leaves.values()), allow_unused=True)
    return time.process_time() - start


def measure(name: str, tokens: int, hidden: int, heads: int, repeats: int) -> dict[str, Any]:
    """One row: milliseconds of operator and summaries, and summaries as shares of the operator."""
    torch.manual_seed(0)
    inputs, operator, plain, written = FORMS[name](tokens, hidden, heads)
    times: dict[str, list[float]] = {"operator": [], "plain": [], "hand-written": []}
    for _ in range(repeats + 1):
        for label, form, last in (("operator", operator, 1), ("plain", plain, 2), ("hand-written", written, 2)):
            times[label].append(seconds(form, inputs, last))
    ms = {label: round(1e3 * statistics.median(t[1:]), 1) for label, t in times.items()}
    shares = {label: round(ms[label] / ms["operator"], 3) for label in ("plain", "hand-written")}
    return {"mixer": name, "tokens": tokens, "milliseconds": ms, "share_of_operator": shares}


def main() -> None:
    """A row per family."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    tune_cpu()
    torch.set_num_threads(1)
    rows = [measure(name, arguments.tokens, arguments.hidden, arguments.heads, arguments.repeats) for name in FORMS]
    for row in rows:
        print(json.dumps(row))
    save_result("context_summary", arguments.output, rows, hidden=arguments.hidden, heads=arguments.heads, dtype="fp32")


if __name__ == "__main__":
    main()
