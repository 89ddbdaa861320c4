"""One layer in one process on its `reference` path against the same layer on P context-parallel ranks: the comparison.

Outputs, the gradient of the input and of every parameter, for three layouts of documents, each of which detects faults that the
others miss: without boundaries a wrong state reaches everything; in `crossing` documents span several ranks, one boundary lies
exactly between two ranks and documents of one token lie in a halo; `short` has several boundaries in every shard.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron.layers.base import Context, Layer
from megatron.parallel.context import ContextParallel
from megatron.parallel.traffic import count_traffic
from megatron.registry import layer_class

B, D, H = 2, 32, 4
LAYOUTS = ("none", "crossing", "short")

Results = dict[str, Tensor]


def documents(layout: str, size: int, length: int, b: int = B) -> Tensor | None:
    """Document numbers [b, size * length] of a layout."""
    total = size * length
    if layout == "none":
        return None
    if layout == "crossing":  # row 1: a boundary between two ranks, behind documents of one token
        rows = [
            [length // 2 + 3, total - length - 5, total - 2],
            [length - 3, length - 2, length - 1, length, total - length - 1],
        ]
    else:
        g = torch.Generator().manual_seed(11)
        rows = [torch.randint(1, total, (total // 11,), generator=g).unique().tolist() for _ in range(b)]
    ids = torch.zeros(b, total, dtype=torch.int32)
    for row, boundaries in enumerate(rows[-b:]):
        for t in boundaries:
            ids[row, t:] += 1
    return ids


def make_layer(name: str, dtype: torch.dtype = torch.float64, width: int = D, heads: int = H, **options: Any) -> Layer:
    """A mixer with random parameters; Mamba's rates and step sizes decay over tens of tokens, as in training."""
    layer: Layer = layer_class(name).build({"hidden_size": width, "num_heads": heads}, options)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter, p in layer.named_parameters():
            p.copy_(
                torch.randn(p.shape, generator=g)
                * (1.0 if p.dim() == 1 else 1.5 * (p.shape[-1] if p.dim() == 2 else 4) ** -0.5)
            )
            if parameter.endswith("A_log"):
                p.copy_(torch.arange(1, p.shape[1] + 1).float().log().expand_as(p))
            elif parameter.endswith("dt_proj.bias"):
                p.sub_(3)
    return layer.to(dtype)


def shard_length(layer: Layer, least: int = 37) -> int:
    """Tokens per rank: `least`, which is no multiple of an operator's chunk, or what the layer's halo needs."""
    return max(least, layer.config.cp_halo() + 3)


class DeltaRule(nn.Module):
    """A toy gated delta rule, S_t = a_t (1 - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T: the decay of a shard is a matrix."""

    def __init__(self, width: int = D, heads: int = H) -> None:
        super().__init__()
        self.heads, self.proj = heads, nn.Linear(width, 3 * width + 2 * heads, bias=False)
        with torch.no_grad():
            self.proj.weight.copy_(torch.randn(self.proj.weight.shape, generator=torch.Generator().manual_seed(0)) / 4)

    def scan(self, x: Tensor, ids: Tensor | None, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs [b, s, d], the last state [b, h, k, v] and the product of all transitions [b, h, k, k]."""
        d = x.shape[-1]
        q, k, v, a, b = self.proj(x).split([d, d, d, self.heads, self.heads], -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))
        k, a, b = F.normalize(k, dim=-1), torch.sigmoid(a + 3)[..., None, None], torch.sigmoid(b)[..., None, None]
        move = torch.eye(k.shape[-1], dtype=x.dtype).expand(x.shape[0], self.heads, -1, -1)
        state, outputs = torch.zeros_like(move) if start is None else start, []
        for t in range(x.shape[1]):
            if ids is not None and t:
                state = state * (ids[:, t] == ids[:, t - 1]).to(x.dtype)[:, None, None, None]
            column, row = k[:, t].unsqueeze(-1), k[:, t].unsqueeze(-2)
            move = a[:, t] * (move - b[:, t] * column @ (row @ move))
            state = a[:, t] * (state - b[:, t] * column @ (row @ state)) + b[:, t] * column @ v[:, t].unsqueeze(-2)
            outputs.append((q[:, t].unsqueeze(-2) @ state).squeeze(-2))
        return torch.stack(outputs, 1).flatten(-2), state, move

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, None]:
        """`x [b, s, d]` -> `y [b, s, d]`."""
        start = ctx.start(None, "recurrent", lambda: self.scan(x, ctx.segment_ids, None)[1:], matrix=True)
        return self.scan(x, ctx.segment_ids, start)[0], None


def whole_row(layer: nn.Module, x: Tensor, dy: Tensor, ids: Tensor | None, backend: str = "reference") -> Results:
    """Outputs and gradients in one process."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x, Context(segment_ids=ids, backend=backend))[0]
    (y * dy).sum().backward()
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad} | {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}


def shard_of_row(
    layer: nn.Module, x: Tensor, dy: Tensor, shard: ContextParallel, backend: str = "auto", recompute: bool = False
) -> tuple[Results, dict[str, float]]:
    """This rank's outputs and input gradient, the sum over the ranks of parameter gradients, and bytes sent by direction."""
    at = slice(shard.offset, shard.offset + shard.length)
    ids = None if shard.segment_ids is None else shard.segment_ids[:, at]
    x = x[:, at].clone().requires_grad_()
    layer.zero_grad()

    def run(u: Tensor) -> Tensor:
        return layer(u, Context(segment_ids=ids, backend=backend, cp=shard))[0]

    with count_traffic() as messages:
        y = checkpoint(run, x, use_reentrant=False) if recompute else run(x)
        (y * dy[:, at]).sum().backward()
    assert x.grad is not None
    results = {"y": y.detach(), "x": x.grad}
    for name, p in layer.named_parameters():  # what the gradient reduction over the context-parallel group does
        results[name] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        dist.all_reduce(results[name], group=shard.group)
    sent = {way: sum(m.sent for m in messages if m.backward == (way == "backward")) for way in ("forward", "backward")}
    return results, sent


def largest_error(whole: Results, own: Results, shard: ContextParallel) -> float:
    """Largest difference on this rank, relative to the largest entry of the tensor; infinite if it is not a number."""
    at, worst = slice(shard.offset, shard.offset + shard.length), 0.0
    for name, value in own.items():
        reference = whole[name][:, at] if name in ("y", "x") else whole[name]
        error = float((value - reference).abs().max() / whole[name].abs().max().clamp_min(1e-30))
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


GATHER, SCAN, RECOMPUTED = ("all_gather", False), ("scan", False), ("all_gather", True)


def compare(
    layer: nn.Module,
    length: int,
    layouts: tuple[str, ...] = LAYOUTS,
    ways: tuple[tuple[str, bool], ...] = (GATHER, SCAN, RECOMPUTED),
    backend: str = "auto",
    width: int = D,
    rows: int = B,
) -> dict[tuple[str, str, bool], tuple[float, dict[str, float]]]:
    """On every rank: (layout, exchange, recomputed) -> the largest error and the bytes sent."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dtype = next(layer.parameters()).dtype
    g = torch.Generator().manual_seed(3)
    x, dy = (torch.randn(rows, size * length, width, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    errors = {}
    for layout in layouts:
        ids = documents(layout, size, length, rows)
        whole = whole_row(layer, x, dy, ids)
        for exchange, recompute in ways:
            shard = ContextParallel(None, rank, size, rows, length, ids, exchange)
            own, sent = shard_of_row(layer, x, dy, shard, backend, recompute)
            errors[layout, exchange, recompute] = largest_error(whole, own, shard), sent
    return errors


def compare_layers(
    layers: dict[str, tuple[str, dict[str, Any]]],
    dtype: torch.dtype = torch.float64,
    heads: int = H,
    least: int = 37,
    **options: Any,
) -> dict[str, Any]:
    """The job of a rank: `compare` for several layers, {label: (name, options)}; `delta` is the toy rule."""
    torch.set_num_threads(1)
    results = {}
    for label, (name, own) in layers.items():
        width = options.get("width", D)
        if name == "delta":
            results[label] = compare(DeltaRule(width, heads).to(dtype), least, **options)
        else:
            layer = make_layer(name, dtype, width, heads, **own)
            results[label] = compare(layer, shard_length(layer, least), **options)
    return results


def worst(results: list[dict[str, Any]]) -> dict[str, float]:
    """Label -> the largest error over ranks, layouts and exchanges."""
    return {label: max(error for rank in results for error, _ in rank[label].values()) for label in results[0]}


def most_sent(results: list[dict[str, Any]], label: str, way: str) -> set[float]:
    """Bytes that the busiest rank sends in one direction; one number if it does not depend on the documents."""
    return {max(rank[label][case][1][way] for rank in results) for case in results[0][label]}
