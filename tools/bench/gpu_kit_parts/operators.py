"""The operators forward, and forward with backward, at the widths of the shipped configs, on the fused and the plain path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.ops.gated import gated
from megatron.ops.metala import metala_packed
from megatron.ops.selective_scan import selective_scan
from megatron.ops.taylor import taylor
from megatron.ops.window import window_step_
from tools.bench.gpu_kit_parts.part import Part


def _times(part: Part, run: Callable[[], Tensor], leaves: Sequence[Tensor]) -> dict[str, Any]:
    """ms of the forward, of forward and backward, and the peak MiB of both."""
    if part.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if part.device == "cuda" else 0
    row = part.forward_and_backward(run, leaves)
    return row | ({"peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20} if part.device == "cuda" else {})


def _metala(part: Part, b: int, t: int, h: int, k: int, v: int, backend: str) -> dict[str, Any]:
    packed, w = part.metala(b, t, h, k, v)
    return _times(part, lambda: metala_packed(packed, w, backend=backend)[0], (packed, w))


def _taylor(part: Part, b: int, t: int, h: int, v: int, backend: str) -> dict[str, Any]:
    q, k, x = (part.random(b, t, h, n, seed=i).requires_grad_() for i, n in enumerate((16, 16, v)))
    return _times(part, lambda: taylor(q, k, x, backend=backend)[0], (q, k, x))


def _scan(part: Part, b: int, t: int, d: int, backend: str) -> dict[str, Any]:
    u, dt = part.random(b, t, d).requires_grad_(), part.random(b, t, d, seed=1, dtype=torch.float32).abs()
    dt.requires_grad_()
    a = (-part.random(d, 16, seed=2, dtype=torch.float32).abs()).requires_grad_()
    bc = [part.random(b, t, 16, seed=3 + i).requires_grad_() for i in range(2)]
    return _times(part, lambda: selective_scan(u, dt, a, *bc, backend=backend)[0], (u, dt, a, *bc))


def _gated(part: Part, rows: int, width: int, backend: str) -> dict[str, Any]:
    a, b = (part.random(rows, width, seed=i).requires_grad_() for i in range(2))
    return _times(part, lambda: gated(a, b, "silu", backend), (a, b))


def _window(part: Part, b: int, h: int, d: int, w: int, backend: str) -> dict[str, Any]:
    """A token step; GB/s counts keys and values once."""
    q, k, v = (part.random(b, h, d, seed=i) for i in range(3))
    ring = part.random(b, w, h, d, seed=3), part.random(b, w, h, d, seed=4)
    places, seen = torch.arange(w, device=part.device).repeat(b, 1), torch.full((b,), w, device=part.device)
    with torch.inference_mode():
        ms = part.ms(lambda: window_step_(q, k, v, *ring, places, seen, scale=d**-0.5, backend=backend))
    return {"ms": ms, "gb_per_s": 2 * ring[0].numel() * ring[0].element_size() / ms / 1e6}


def run(part: Part) -> None:
    """Rows `operator backend sizes`; the plain path, which takes far longer, at one size."""
    shapes = [(1, 40, 1, 16, 32)] if part.rehearse else [
        (8, 2048, 8, 64, 128), (8, 2048, 16, 64, 128), (1, 16384, 16, 64, 128), (2, 8192, 8, 64, 128),
        (8, 2048, 24, 64, 128), (8, 2048, 4, 128, 256),
    ]  # fmt: skip
    taylor_shapes = [(1, 20, 1, 16)] if part.rehearse else [(4, 8192, 16, 64), (8, 2048, 16, 64)]
    scan_shapes = [(1, 12, 16)] if part.rehearse else [(8, 2048, 2048), (8, 2048, 4096), (1, 16384, 4096)]
    gated_shapes = [(20, 48)] if part.rehearse else [(16384, 5632), (32768, 2816)]
    window_shapes = [(2, 2, 16, 8)] if part.rehearse else [(64, 32, 64, 128), (1, 32, 64, 128)]
    operators: list[tuple[str, Callable[..., dict[str, Any]], Sequence[tuple[int, ...]]]] = [
        ("metala", _metala, shapes),
        ("taylor", _taylor, taylor_shapes),
        ("selective scan", _scan, scan_shapes),
        ("gated", _gated, gated_shapes),
        ("window step", _window, window_shapes),
    ]
    for backend in ("triton", "torch"):
        for name, measure, sizes in operators:
            for size in sizes if backend == "triton" else sizes[-1:]:
                part.row(f"{name} {backend} {' x '.join(map(str, size))}", measure, part, *size, backend)
