"""Time, bandwidth and floors for `metala_gpu.py`; on a CPU by its clock, so that the script can be checked without a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


class Clock:
    """Median milliseconds of a call on one device; each has a time budget instead of a fixed count."""

    def __init__(self, device: str, seconds: float = 0.25, most: int = 50) -> None:
        self.cuda, self.seconds, self.most = device != "cpu", seconds, most

    def _once(self, call: Callable[[], Any]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))

    def __call__(self, call: Callable[[], Any]) -> float:
        """ms; the first calls compile and warm up and do not count."""
        for _ in range(3 if self.cuda else 1):
            first = self._once(call)
        count = max(1, min(self.most, int(self.seconds * 1e3 / max(first, 1e-3))))
        return statistics.median(self._once(call) for _ in range(count))


def copy_bandwidth(device: str) -> float:
    """TB/s of a large device copy, bytes read plus bytes written: what memory gives in practice."""
    size = 1 << 30 if device != "cpu" else 1 << 22
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / Clock(device)(lambda: target.copy_(source)) / 1e9


def product_rate(device: str) -> float:
    """TFLOP/s of a large bf16 matrix product (fp32 on a CPU)."""
    n, dtype = (8192, torch.bfloat16) if device != "cpu" else (256, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / Clock(device)(lambda: a @ a) / 1e9


def floor_ms(d: int, heads: int, tokens: int, bandwidth: float, rate: float, backward: bool, size: int = 2) -> dict[str, float]:
    """Milliseconds below which the operator cannot run: its inputs and outputs once, its products (chunks of 64) at full rate.

    Forward reads q, z (d / 2 each), v, g and writes y: 4 d numbers per token. Backward reads those inputs and dy and writes the
    packed gradient: 7 d. It forms the forward's products again and twice as many of its own.
    """
    k, v = d // (2 * heads), d // heads
    flops = heads * (2 * 64 * (k + v) + 4 * k * v) * tokens * (3 if backward else 1)
    moved = (7 if backward else 4) * d * tokens * size
    return {"bytes_ms": moved / bandwidth / 1e9, "flops_ms": flops / rate / 1e9}
