"""Every fused kernel once, forward and backward, at the shape of the shipped configs: does it run, and is all of it finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.model.config import ModelConfig
from megatron.ops.conv import causal_conv
from megatron.ops.cross_entropy import row_gradient_, row_stats
from megatron.ops.gated import gated, gated_packed
from megatron.ops.metala import cut_packed, metala_packed, metala_step_
from megatron.ops.norm import add_norm, norm
from megatron.ops.packed_linear import packed_linear
from megatron.ops.taylor import empty_taylor_state, taylor, taylor_step_
from megatron.ops.window import window_step_
from tools.bench.gpu_kit_parts.models import MIXERS, Trainee, backend_of, decoding
from tools.bench.gpu_kit_parts.part import Part


def _finite(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> dict[str, Any]:
    """Whether outputs and the gradients of the leaves are finite."""
    gradients = torch.autograd.grad([x.float().sum() for x in outputs], list(leaves)) if leaves else ()
    return {"finite": all(bool(torch.isfinite(x).all()) for x in (*outputs, *gradients))}


def _step(part: Part, b: int, h: int, k: int, v: int) -> dict[str, Any]:
    packed, w = (x.detach() for x in part.metala(b, 1, h, k, v))
    state = torch.zeros(b, h, k, v, device=part.device)
    return _finite([metala_step_(*cut_packed(packed[:, 0], w), w, state, backend="triton"), state], [])


def _window(part: Part, b: int, h: int, d: int, w: int) -> dict[str, Any]:
    q, k, v = (part.random(b, h, d, seed=i) for i in range(3))
    ring = part.random(b, w, h, d, seed=3), part.random(b, w, h, d, seed=4)
    places, seen = torch.arange(w, device=part.device).repeat(b, 1), torch.full((b,), w, device=part.device)
    return _finite([window_step_(q, k, v, *ring, places, seen, scale=d**-0.5, backend="triton"), *ring], [])


def _taylor_step(part: Part, b: int, h: int, v: int) -> dict[str, Any]:
    q, k, x = (part.random(b, h, n, seed=i) for i, n in enumerate((16, 16, v)))
    state = empty_taylor_state(b, h, 16, v, q.dtype, part.device)
    return _finite([taylor_step_(q, k, x, state, backend="triton"), state], [])


def _cross_entropy(part: Part, rows: int, words: int) -> dict[str, Any]:
    logits, labels = part.random(rows, words), torch.arange(rows, device=part.device) % words
    peak, total, picked = row_stats(logits, labels, "triton")
    row_gradient_(logits, labels, peak, total, torch.ones(rows, device=part.device), "triton")
    return _finite([peak, total, picked, logits], [])


def _model(part: Part, mixer: str) -> dict[str, Any]:
    """One training step and a few recorded token steps of a small model with this mixer in every block."""
    d, heads = (32, 2) if part.rehearse else (512, 8)
    config = ModelConfig(128, d, 2, heads, 2 * d, (mixer, mixer))
    trainee = Trainee(part.device, config, 24 if part.rehearse else 256)
    trainee.use(backend_of(part, mixer))
    loss = trainee.step(2)
    return {"loss": loss, "finite": loss == loss, **decoding(part, config, 2, steps=4)}


def run(part: Part) -> None:
    """A row per kernel, then one per mixer."""
    b, t, h, k, v = (2, 20, 2, 16, 32) if part.rehearse else (4, 520, 8, 64, 128)
    d = h * v
    packed, w = part.metala(b, t, h, k, v)
    x, up = part.random(b, t, d, seed=2).requires_grad_(), part.random(b, t, d, seed=3).requires_grad_()
    weight, scale = part.random(d, 1, 4, seed=4).requires_grad_(), part.random(d, seed=5).requires_grad_()
    square = part.random(d, d, seed=6).requires_grad_()
    heads = [part.random(b, t, h, n, seed=7 + i).requires_grad_() for i, n in enumerate((16, 16, k))]
    rows: dict[str, Callable[[], dict[str, Any]]] = {
        "metala": lambda: _finite(metala_packed(packed, w, backend="triton"), [packed, w]),
        "metala step": lambda: _step(part, b, h, k, v),
        "taylor": lambda: _finite(taylor(*heads, backend="triton"), heads),
        "taylor step": lambda: _taylor_step(part, b, h, k),
        "conv": lambda: _finite([causal_conv(x, weight, backend="triton")], [x, weight]),
        "norm": lambda: _finite([norm(x, scale, None, centred=False, eps=1e-5, backend="triton")], [x, scale]),
        "add norm": lambda: _finite(add_norm(x, up, scale, None, centred=False, eps=1e-5, backend="triton"), [x, up, scale]),
        "packed linear": lambda: _finite([packed_linear(x, [square], None, backend="triton")], [x, square]),
        "gated": lambda: _finite([gated(x, up, "silu", "triton"), gated(x, up, "gelu", "triton")], [x, up]),
        "gated packed": lambda: _finite([gated_packed(packed, "gelu_tanh", "triton")], [packed]),
        "window step": lambda: _window(part, b, h, k, 16 if part.rehearse else 128),
        "cross entropy": lambda: _cross_entropy(part, b * t, 500),
    }
    for name, measure in rows.items():
        part.row(name, measure)
    for mixer in MIXERS:
        part.row(f"model of {mixer}", _model, part, mixer)
