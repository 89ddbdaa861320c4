"""The fused MetaLA operator on a GPU: launches `metala_kernels.py` as custom operators that `torch.compile` keeps in its graph.

Only the inputs are kept for the backward; everything else is computed again, which costs less than reading it back. States are
stored in the compute dtype at chunk borders and carried in fp32 in between. Inputs may be views of one packed projection: a
token's row may lie anywhere, heads and channels must be dense.

With `TRITON_INTERPRET=1` set before Triton is imported the same code runs on a CPU, slowly: so it is tested without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.ops import metala_kernels as kernels
from megatron.ops.dispatch import path

EPS = 1e-5
_ROUND = {"none": 0, "bf16": 1, "fp16": 2}
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Tiles:
    """How the kernels are cut for one pair of head widths.

    interval: tokens between stored states forward (a multiple of `out`). out: rows of the output kernel's tile.
    back: rows of every backward tile, which is also the interval of its states. block_v: value columns per state program.
    """

    interval: int
    out: int
    back: int
    block_v: int
    warps: int


def tiles_for(key_dim: int, value_dim: int) -> Tiles:
    """The committed choice; no tuning at start. Tiles shrink as heads widen to stay in registers: see tools/bench."""
    bk, bv = _padded(key_dim), _padded(value_dim)
    block_v = min(bv, 64)
    if bk <= 32 and bv <= 64:
        return Tiles(64, 64, 64, block_v, 8)
    if bk <= 64 and bv <= 128:
        return Tiles(64, 32, 32, block_v, 8)
    return Tiles(32, 32, 32, block_v, 8)


def _padded(width: int) -> int:
    """The power of two that holds `width`; at least 16, the smallest side of a matrix product."""
    return max(16, triton.next_power_of_2(width))


@dataclass(frozen=True)
class _Shape:
    """Everything about a call that the kernels are specialised on."""

    b: int
    t: int
    h: int
    k: int
    v: int
    dtype: Any
    precision: str
    gate_round: int

    @classmethod
    def of(cls, q: Tensor, v: Tensor, gate_round: int) -> _Shape:
        if v.dtype not in _DTYPES:
            raise ValueError(f"the triton path takes fp32, bf16 or fp16, not {v.dtype}")
        b, t, h, k = q.shape
        return cls(b, t, h, k, v.shape[-1], _DTYPES[v.dtype], "ieee" if v.dtype == torch.float32 else "tf32", gate_round)

    def widths(self, block_v: int | None = None) -> dict[str, int]:
        """Head count, widths and their paddings; `block_v` columns per program instead of all."""
        return {"H": self.h, "K": self.k, "V": self.v, "BK": _padded(self.k), "BV": block_v or _padded(self.v)}

    def numerics(self) -> dict[str, Any]:
        return {"DT": self.dtype, "PREC": self.precision, "ROUND": self.gate_round}


def _rows(x: Tensor) -> Tensor:
    """x [b, t, h, c] with dense heads and channels and evenly spaced tokens; copied only where it is not so."""
    b, t, _, c = x.shape
    dense = x.stride(3) == 1 and x.stride(2) == c and (b == 1 or x.stride(0) == t * x.stride(1))
    return x if dense else x.contiguous()


def _flags(mask: Tensor | None, segment_ids: Tensor | None) -> dict[str, bool]:
    return {"HAS_SEG": segment_ids is not None, "HAS_MASK": mask is not None}


def _states(
    s: _Shape,
    z: Tensor,
    v: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    segment_ids: Tensor | None,
    chunk: int,
    tiles: Tiles,
) -> tuple[Tensor, Tensor]:
    """States before every chunk of `chunk` tokens [b, n, h, k, v] in v's dtype, and the last one in fp32."""
    kept = v.new_empty(s.b, -(-s.t // chunk), s.h, s.k, s.v)
    final = torch.empty(s.b, s.h, s.k, s.v, dtype=torch.float32, device=v.device)
    grid = (triton.cdiv(s.v, tiles.block_v), s.b * s.h)
    start = final if state is None else state.float().contiguous()
    kernels.state_forward[grid](
        z, v, kept, start, final, segment_ids, mask, z.stride(1), v.stride(1), s.t,
        **s.widths(tiles.block_v), C=chunk, NSUP=1, **s.numerics(), HAS_H0=state is not None, **_flags(mask, segment_ids),
        num_warps=tiles.warps,
    )  # fmt: skip
    return kept, final


@torch.library.custom_op("linear_neox::metala_forward", mutates_args=())
def metala_forward(
    q: Tensor,
    z: Tensor,
    v: Tensor,
    g: Tensor,
    w: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    segment_ids: Tensor | None,
    gate_round: int,
) -> tuple[Tensor, Tensor]:
    """y [b, t, h, v] and the last state [b, h, k, v] in fp32; arguments as in `ops/metala.py`."""
    q, z, v, g, w = _rows(q), _rows(z), _rows(v), _rows(g), w.contiguous()
    s = _Shape.of(q, v, gate_round)
    tiles = tiles_for(s.k, s.v)
    kept, final = _states(s, z, v, state, mask, segment_ids, tiles.interval, tiles)
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    kernels.output_forward[(kept.shape[1], s.b * s.h)](
        q, z, v, g, w, kept, y, segment_ids, mask, q.stride(1), z.stride(1), v.stride(1), g.stride(1), y.stride(1),
        s.k**-0.5, EPS, s.t, **s.widths(), C=tiles.out, NSUP=tiles.interval // tiles.out, **s.numerics(),
        **_flags(mask, segment_ids), num_warps=tiles.warps,
    )  # fmt: skip
    return y, final


@metala_forward.register_fake
def _(
    q: Any, z: Any, v: Any, g: Any, w: Any, state: Any, mask: Any, segment_ids: Any, gate_round: Any
) -> tuple[Tensor, Tensor]:
    b, _, h, k = q.shape
    return torch.empty(v.shape, dtype=v.dtype, device=v.device), q.new_empty(b, h, k, v.shape[-1], dtype=torch.float32)


@torch.library.custom_op("linear_neox::metala_backward", mutates_args=())
def metala_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    z: Tensor,
    v: Tensor,
    g: Tensor,
    w: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    segment_ids: Tensor | None,
    gate_round: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, z, v, g (dense, in their dtypes), w (its dtype) and the initial state (fp32)."""
    q, z, v, g, w, dy = _rows(q), _rows(z), _rows(v), _rows(g), w.contiguous(), _rows(dy)
    s = _Shape.of(q, v, gate_round)
    tiles = tiles_for(s.k, s.v)
    kept, final = _states(s, z, v, state, mask, segment_ids, tiles.back, tiles)
    chunks, flags = kept.shape[1], _flags(mask, segment_ids)
    scale, each = s.k**-0.5, (chunks, s.b * s.h)
    do, dg = (torch.empty(v.shape, dtype=x.dtype, device=v.device) for x in (v, g))
    damount = torch.empty(s.b, s.t, s.h, dtype=torch.float32, device=v.device)
    kernels.output_backward[each](
        q, z, v, g, w, kept, dy, do, dg, damount, segment_ids, mask,
        q.stride(1), z.stride(1), v.stride(1), g.stride(1), dy.stride(1), scale, EPS, s.t,
        **s.widths(), C=tiles.back, **s.numerics(), **flags, num_warps=tiles.warps,
    )  # fmt: skip
    dkept, dstate = torch.empty_like(kept), torch.empty_like(final)
    kernels.state_backward[(triton.cdiv(s.v, tiles.block_v), s.b * s.h)](
        q, z, do, dkept, final if dfinal is None else dfinal.contiguous(), dstate, segment_ids, mask, q.stride(1), z.stride(1),
        scale, s.t, **s.widths(tiles.block_v), C=tiles.back, **s.numerics(), HAS_DHT=dfinal is not None, **flags,
        num_warps=tiles.warps,
    )  # fmt: skip
    dq, dz = (torch.empty(q.shape, dtype=x.dtype, device=v.device) for x in (q, z))
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    dw = torch.empty(s.b, chunks, s.h, s.k, dtype=torch.float32, device=v.device)
    kernels.input_backward[each](
        q, z, v, w, kept, dkept, do, damount, dq, dz, dv, dw, segment_ids, mask,
        q.stride(1), z.stride(1), v.stride(1), scale, s.t,
        **s.widths(tiles.block_v), C=tiles.back, **s.numerics(), **flags, num_warps=tiles.warps,
    )  # fmt: skip
    return dq, dz, dv, dg, dw.sum((0, 1)).to(w.dtype), dstate


@metala_backward.register_fake
def _(dy: Any, dfinal: Any, q: Any, z: Any, v: Any, g: Any, w: Any, state: Any, mask: Any, ids: Any, gate_round: Any) -> Any:
    b, _, h, k = q.shape
    like = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, z, v, g, w)]
    return (*like, q.new_empty(b, h, k, v.shape[-1], dtype=torch.float32))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.gate_round = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, dy: Tensor, dfinal: Tensor | None) -> Any:
    saved = ctx.saved_tensors
    dq, dz, dv, dg, dw, dstate = metala_backward(dy, dfinal, *saved, ctx.gate_round)
    return dq, dz, dv, dg, dw, dstate if saved[5] is not None else None, None, None, None


metala_forward.register_autograd(_gradient, setup_context=_setup)


@path("metala", "triton")
def metala_fused(
    q: Tensor,
    z: Tensor,
    v: Tensor,
    g: Tensor,
    w: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    segment_ids: Tensor | None,
    gate_round: str,
) -> tuple[Tensor, Tensor]:
    """The fused path; arguments and results as `metala` in `ops/metala.py`."""
    mask = None if mask is None else mask.to(torch.int8).contiguous()
    segment_ids = None if segment_ids is None else segment_ids.to(torch.int32).contiguous()
    return metala_forward(q, z, v, g, w, state, mask, segment_ids, _ROUND[gate_round])


def metala_step_in_place(
    q: Tensor, z: Tensor, v: Tensor, g: Tensor, w: Tensor, state: Tensor, slots: Tensor | None = None, gate_round: str = "none"
) -> Tensor:
    """One token per row: q, z [b, h, k]; v, g [b, h, v] -> y [b, h, v]; the fp32 state [slots, h, k, v] is updated in place.

    slots: int [b], the row of `state` that belongs to each batch row (continuous batching); None means row i of i.
    """
    b, h, k = q.shape
    q, z, v, g = (x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous() for x in (q, z, v, g))
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    kernels.step_forward[(b * h,)](
        q, z, v, g, w.contiguous(), state, slots, y, q.stride(0), z.stride(0), v.stride(0), g.stride(0), k**-0.5, EPS,
        H=h, K=k, V=v.shape[2], BK=_padded(k), BV=_padded(v.shape[2]), ROUND=_ROUND[gate_round], HAS_SLOTS=slots is not None,
        num_warps=16 if k * v.shape[2] > 64 * 128 else 4,
    )  # fmt: skip
    return y
