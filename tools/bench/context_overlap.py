"""How much of a context-parallel message a mixer hides behind its own work, on one core with a simulated link.

    python tools/bench/context_overlap.py [--delay 20] [--tokens 2048] [--hidden 512] [--output FILE.json]

One process plays the last of `--ranks` ranks: a message arrives `--delay` milliseconds after it was started. Counted is the
time spent waiting in one layer, forward and backward, once with a wait directly behind each start and once where the mixer
waits. The median of `--repeats`.
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
from megatron.layers.base import Context, Layer
from megatron.parallel.context import ContextParallel
from megatron.registry import layer_class
from tools.bench.cpu_result import save_result

MIXERS: dict[str, dict[str, Any]] = {
    "metala": {},
    "based": {},
    "jrt": {"prefix_length": 256},
    "mamba": {},
    "base_conv": {},
    "sliding": {"window": 128},
}


class DelayedShard(ContextParallel):
    """A shard whose messages arrive some time after they were started, as copies of what it sends.

    Attributes:
        delay: of each message, seconds.
        at_once: wait directly behind the start.
        waited: seconds spent waiting so far.
        messages: so far.
    """

    delay = 0.0
    at_once = False
    waited = 0.0
    messages = 0

    def _arriving(self, received: Tensor) -> Callable[[], Tensor]:
        due = time.monotonic() + self.delay
        self.messages += 1

        def wait() -> Tensor:
            before = time.monotonic()
            time.sleep(max(0.0, due - before))
            self.waited += time.monotonic() - before
            return received

        if self.at_once:
            wait()
            return lambda: received
        return wait

    def start_all_gather(self, x: Tensor) -> Callable[[], Tensor]:
        """As if every rank sent the same."""
        return self._arriving(x.expand(self.size, *x.shape).clone())

    def start_shift(self, x: Tensor, by: int) -> Callable[[], Tensor]:
        """As if the neighbour sent the same."""
        return self._arriving(x.clone())


def one_pass(layer: Layer, x: Tensor, ranks: int, delay: float, at_once: bool) -> DelayedShard:
    """Forward and backward; the shard has counted."""
    shard = DelayedShard(None, ranks - 1, ranks, x.shape[0], x.shape[1], device=x.device)
    shard.delay, shard.at_once = delay, at_once
    y, _ = layer(x.detach().requires_grad_(), Context(cp=shard))
    y.sum().backward()
    return shard


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row: milliseconds of waiting per pass forward and backward."""
    torch.manual_seed(0)
    shape = {"hidden_size": arguments.hidden, "num_heads": arguments.heads}
    layer: Layer = layer_class(name).build(shape, MIXERS[name])
    layer.pack_weights()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape) / p.shape[-1] ** 0.5 if p.dim() > 1 else torch.zeros(p.shape))
    x = torch.randn(1, arguments.tokens, arguments.hidden)
    waits: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(arguments.repeats + 1):
        for at_once in waits:
            shard = one_pass(layer, x, arguments.ranks, arguments.delay / 1e3, at_once)
            waits[at_once].append(shard.waited)
    blocking, overlapped = (round(1e3 * statistics.median(waits[key][1:]), 1) for key in (True, False))
    return {
        "mixer": name,
        "messages": shard.messages,
        "waited_at_once_ms": blocking,
        "waited_ms": overlapped,
        "hidden_share": round(1 - overlapped / blocking, 3),
    }


def main() -> None:
    """A row per mixer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--delay", type=float, default=20.0, help="of a message, milliseconds")
    parser.add_argument("--tokens", type=int, default=2048, help="of the shard")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    tune_cpu()
    torch.set_num_threads(1)
    rows = [measure(name, arguments) for name in MIXERS]
    for row in rows:
        print(json.dumps(row))
    facts = {name: getattr(arguments, name) for name in ("delay", "tokens", "hidden", "heads", "ranks")}
    save_result("context_overlap", arguments.output, rows, **facts, dtype="fp32")


if __name__ == "__main__":
    main()
