"""The operators forward, and forward with backward, at the widths of the shipped configs, on the fused and the plain path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron.ops.metala import metala_packed
from megatron.ops.selective_scan import selective_scan
from megatron.ops.taylor import taylor
from tools.bench.gpu_kit_parts.part import Part


def _times(part: Part, run: Callable[[], Tensor], leaves: Sequence[Tensor]) -> dict[str, Any]:
    """ms of the forward, of forward and backward, and the peak MiB of both."""
    if part.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if part.device == "cuda" else 0
    with torch.no_grad():
        forward = part.ms(run)
    up = torch.ones_like(run())
    both = part.ms(lambda: torch.autograd.grad(run(), list(leaves), up), 10)
    row = {"forward_ms": forward, "forward_backward_ms": both}
    return row | ({"peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20} if part.device == "cuda" else {})


def _metala(part: Part, b: int, t: int, h: int, k: int, v: int, backend: str) -> dict[str, Any]:
    packed, w = part.metala(b, t, h, k, v)
    return _times(part, lambda: metala_packed(packed, w, backend=backend)[0], (packed, w))


def _taylor(part: Part, b: int, t: int, h: int, v: int, backend: str) -> dict[str, Any]:
    q, k, x = (part.random(b, t, h, n, seed=i).requires_grad_() for i, n in enumerate((16, 16, v)))
    return _times(part, lambda: taylor(q, k, x, backend=backend)[0], (q, k, x))


def _scan(part: Part, b: int, t: int, d: int, backend: str) -> dict[str, Any]:
    u, dt = part.random(b, t, d).requires_grad_(), part.random(b, t, d, seed=1).abs().requires_grad_()
    a = (-part.random(d, 16, seed=2, dtype=torch.float32).abs()).requires_grad_()
    bc = [part.random(b, t, 16, seed=3 + i).requires_grad_() for i in range(2)]
    return _times(part, lambda: selective_scan(u, dt, a, *bc, backend=backend)[0], (u, dt, a, *bc))


def run(part: Part) -> None:
    """Rows `operator backend b x t x h x k x v`."""
    shapes = [(1, 40, 1, 16, 32)] if part.rehearse else [
        (8, 2048, 8, 64, 128), (8, 2048, 16, 64, 128), (1, 16384, 16, 64, 128), (2, 8192, 8, 64, 128),
        (8, 2048, 24, 64, 128), (8, 2048, 4, 128, 256),
    ]  # fmt: skip
    for backend in ("triton", "torch"):
        for shape in shapes[: None if backend == "triton" else 2]:
            name = f"metala {backend} {' x '.join(map(str, shape))}"
            part.row(name, lambda shape=shape, backend=backend: _metala(part, *shape, backend))
    taylor_shapes = [(1, 20, 1, 16)] if part.rehearse else [(8, 2048, 16, 64), (4, 8192, 16, 64)]
    for backend in ("triton", "torch"):
        for sizes in taylor_shapes[: None if backend == "triton" else 1]:
            part.row(f"taylor {backend} {' x '.join(map(str, sizes))}", partial(_taylor, part, *sizes, backend))
    for b, t, d in [(1, 12, 16)] if part.rehearse else [(8, 2048, 2048)]:
        part.row(f"selective scan torch {b} x {t} x {d}", lambda s=(b, t, d): _scan(part, *s, "torch"))
