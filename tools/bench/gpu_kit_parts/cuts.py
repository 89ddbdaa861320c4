"""Every cut of the 64 x 128 head in bf16, those of the table and others around them: which should stand first there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from megatron.ops.metala import metala_packed, triton_launch
from megatron.ops.tuning import Tiles, metala_cuts
from tools.bench.gpu_kit_parts.kernels import profiled
from tools.bench.gpu_kit_parts.part import Part


def _variants(first: Tiles) -> list[Tiles]:
    """The cut of the table and its neighbours, mostly one change at a time."""
    changes: list[dict[str, int]] = [
        {}, {"back_warps": 8}, {"warps": 8}, {"rows": 32}, {"rows": 16},
        {"walk_warps": 8}, {"walk_warps": 2}, {"gate_warps": 8}, {"gate_warps": 2}, {"block_v": 32},
        {"block_v": 128, "stages": 1}, {"stages": 2}, {"stages": 1}, {"value_warps": 8}, {"value_warps": 8, "block_v": 128},
        {"chunk": 32}, {"chunk": 128, "rows": 64}, {"chunk": 128, "rows": 32}, {"back": 32},
        {"back": 32, "back_warps": 8}, {"chunk": 32, "warps": 8},
    ]  # fmt: skip
    return [replace(first, **change) for change in changes]


def _times(part: Part, tiles: Tiles, h: int, k: int, v: int) -> dict[str, Any]:
    packed, w = part.metala(1 if part.rehearse else 8, 40 if part.rehearse else 2048, h, k, v)
    before = triton_launch.Inputs.tiles
    setattr(triton_launch.Inputs, "tiles", lambda _: tiles)  # noqa: B010 (of this process, for this row)
    try:
        with torch.no_grad():
            forward = part.ms(lambda: metala_packed(packed, w, backend="triton"))
            kernels = {"forward": profiled(lambda: metala_packed(packed, w, backend="triton"), part.calls, part.device)[:3]}
        y = metala_packed(packed, w, backend="triton")[0]
        up = torch.ones_like(y)
        backward = part.ms(lambda: torch.autograd.grad(y, (packed, w), up, retain_graph=True), 10)
        again = profiled(lambda: torch.autograd.grad(y, (packed, w), up, retain_graph=True), part.calls, part.device)
    finally:
        setattr(triton_launch.Inputs, "tiles", before)  # noqa: B010
    return {"forward_ms": forward, "backward_ms": backward, **kernels, "backward": again[:6]}


def run(part: Part) -> None:
    """A row per cut and head count."""
    h, k, v = (1, 16, 32) if part.rehearse else (16, 64, 128)
    cuts = _variants(metala_cuts(k, v, part.dtype.itemsize)[0])
    for tiles in cuts[:2] if part.rehearse else cuts:
        part.row(f"{k} x {v}, {h} heads: {tiles}", _times, part, tiles, h, k, v)
