"""Every kernel of an operator by itself: microseconds from the profiler, and the share of the copy bandwidth that it reaches.

Bytes are those of `tools/bench/kernel_times.py`: each value read or written once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megatron.ops.conv import causal_conv
from megatron.ops.gated import gated_packed
from megatron.ops.metala import metala_packed
from megatron.ops.norm import add_norm
from megatron.ops.taylor import taylor
from megatron.ops.tuning import metala_cuts
from tools.bench.gpu_kit_parts.part import Part
from tools.bench.kernel_times import IN_BACKWARD, works


def profiled(call: Callable[[], Any], calls: int, device: str) -> list[tuple[str, float, float]]:
    """(kernel, microseconds of a call, launches of a call), the dearest first."""
    call()
    activity = ProfilerActivity.CPU if device == "cpu" else ProfilerActivity.CUDA
    with profile(activities=[activity]) as record:
        for _ in range(calls):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
    rows = [
        (e.key[:90], (e.self_cpu_time_total if device == "cpu" else e.self_device_time_total) / calls, e.count / calls)
        for e in record.key_averages()
    ]
    return sorted((row for row in rows if row[1] > 0), key=lambda row: -row[1])


def _shares(part: Part, call: Callable[[], Any], calls: int, moved: dict[str, float]) -> dict[str, Any]:
    """The kernels of a call, and for those in `moved` the share of the copy bandwidth that they reach."""
    rows = profiled(call, calls, part.device)
    copy = part.fact("copy", "tb_per_s")
    shares = {name: moved[name] / us / 1e6 / copy for name, us, _ in rows if name in moved and copy}
    return {"kernels": rows[:14], "of_copy_bandwidth": shares}


def run(part: Part) -> None:
    """A row per operator, size and pass."""
    b, t = (1, 40) if part.rehearse else (8, 2048)
    calls = 1 if part.rehearse else 5
    for h in (1,) if part.rehearse else (8, 16):
        k, v = (16, 32) if part.rehearse else (64, 128)
        d = h * v
        packed, w = part.metala(b, t, h, k, v)
        table = {
            name: work.bytes for name, work in works(b * t, b, h, k, v, metala_cuts(k, v, packed.element_size())[0]).items()
        }
        y = metala_packed(packed, w, backend="triton")[0]
        up = torch.ones_like(y)

        def forward(packed: Any = packed, w: Any = w) -> None:
            with torch.no_grad():
                metala_packed(packed, w, backend="triton")

        def backward(y: Any = y, packed: Any = packed, w: Any = w, up: Any = up) -> None:
            torch.autograd.grad(y, (packed, w), up, retain_graph=True)

        late = {name: table[IN_BACKWARD.get(name, name)] for name in (*IN_BACKWARD, *table)}
        part.row(f"metala forward d={d}", _shares, part, forward, calls, table)
        part.row(f"metala backward d={d}", _shares, part, backward, calls, late)
        x, added = part.random(b, t, d).requires_grad_(), part.random(b, t, d, seed=1).requires_grad_()
        weight, gain = part.random(d, 1, 4).requires_grad_(), part.random(d).requires_grad_()
        conv = causal_conv(x, weight, backend="triton")
        normed = add_norm(x, added, gain, None, centred=False, eps=1e-6, backend="triton")
        both = {
            "conv": lambda x=x, weight=weight: causal_conv(x, weight, backend="triton"),
            "conv backward": lambda y=conv, x=x, w=weight: torch.autograd.grad(y, (x, w), x, retain_graph=True),
            "add norm": lambda x=x, a=added, g=gain: add_norm(x, a, g, None, centred=False, eps=1e-6, backend="triton"),
            "add norm backward": lambda y=normed, x=x, a=added, g=gain: torch.autograd.grad(
                y, (x, a, g), (x, a), retain_graph=True
            ),
        }
        width = 64 if part.rehearse else 2816 * h // 8
        halves = part.random(b, t, 2 * width).requires_grad_()
        product = gated_packed(halves, "silu", "triton")
        both |= {
            "gated": lambda x=halves: gated_packed(x, "silu", "triton"),
            "gated backward": lambda y=product, x=halves: torch.autograd.grad(y, x, y.detach(), retain_graph=True),
        }
        size, gated = (packed.element_size() * b * t * n for n in (d, width))
        moved = {
            "conv_forward": 2.0 * size,
            "conv_backward": 3.0 * size,
            "norm_forward": 4.0 * size,
            "norm_backward": 4.0 * size,
            "gated_forward": 3.0 * gated,
            "gated_backward": 5.0 * gated,
        }
        for name, call in both.items():
            part.row(f"{name} d={d}", _shares, part, call, calls, moved)
    b, t, h, v = (1, 20, 1, 16) if part.rehearse else (4, 8192, 16, 64)
    leaves = [part.random(b, t, h, n, seed=i).requires_grad_() for i, n in enumerate((16, 16, v))]
    summed, up = taylor(*leaves, backend="triton")[0], part.random(b, t, h, v, seed=3)
    passes: dict[str, Callable[[], Any]] = {
        "forward": lambda: taylor(*leaves, backend="triton"),
        "backward": lambda: torch.autograd.grad(summed, leaves, up, retain_graph=True),
    }
    for name, call in passes.items():
        part.row(f"taylor {name} {b} x {t} x {h} x {v}", _shares, part, call, calls, {})
