"""Runs the Triton kernels of MetaLA on tensors: shapes, strides, grids, and where a sequence is walked over in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.ops.kernel_arguments import device_guard, token_rows, token_stride
from megatron.ops.metala import triton_kernels as kernels
from megatron.ops.metala import triton_walk_kernels as walks
from megatron.ops.tuning import Tiles, metala_cuts, metala_rows, metala_run, padded

EPS = 1e-5
ROUND = {"none": 0, "bf16": 1, "fp16": 2}
# How a matrix product of elements of so many bytes is formed: three tf32 products for fp32 (an error of about 1e-6; exact fp32
# products have no tensor cores and do not fit into registers), and nothing to choose in 16 bits.
PRECISION = {2: "tf32", 4: "tf32x3"}
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Fewer sequential programs than this leave most of a GPU's 100 to 150 multiprocessors idle.
_FEW_PROGRAMS = 100
# A part of fewer chunks than this would spend its time on reading and writing states.
_LEAST_CHUNKS, _MOST_PARTS = 4, 16


def parts_for(programs: int, chunks: int) -> int:
    """Into how many parts a sequence of `chunks` chunks is cut where a state kernel would have this many programs."""
    if programs >= _FEW_PROGRAMS:
        return 1
    return max(1, min(2 * _FEW_PROGRAMS // programs, chunks // _LEAST_CHUNKS, _MOST_PARTS))


@dataclass(frozen=True)
class Inputs:
    """q, z [b, t, h, k]; v, g [b, t, h, v]; w [h, k]; all with dense heads and channels and evenly spaced tokens."""

    q: Tensor
    z: Tensor
    v: Tensor
    g: Tensor
    w: Tensor
    mask: Tensor | None
    segment_ids: Tensor | None
    gate_round: int

    @classmethod
    def of(cls, parts: Sequence[Tensor], w: Tensor, mask: Tensor | None, segment_ids: Tensor | None, gate_round: int) -> Inputs:
        """Checked, and copied where the strides are not as the kernels need them."""
        if parts[2].dtype not in _DTYPES:
            raise ValueError(f"the triton path takes fp32, bf16 or fp16, not {parts[2].dtype}")
        q, z, v, g = (token_rows(x) for x in parts)
        return cls(q, z, v, g, w.contiguous(), mask, segment_ids, gate_round)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """b, t, h, k, v."""
        b, t, h, k = self.q.shape
        return b, t, h, k, self.v.shape[-1]

    def tiles(self) -> Tiles:
        """The committed cut for these widths and this precision."""
        return metala_cuts(self.q.shape[-1], self.v.shape[-1], self.v.element_size())[0]

    def constants(self, chunk: int, block_v: int | None = None) -> dict[str, Any]:
        """What the kernels with matrix products are specialised on; `block_v` value columns per program instead of all."""
        _, _, _, k, v = self.sizes
        dtype = self.v.dtype
        widths = {"K": k, "V": v, "BK": padded(k), "BV": block_v or padded(v), "C": chunk}
        return {**widths, "DT": _DTYPES[dtype], "PREC": PRECISION[dtype.itemsize], "HAS_SEG": self.segment_ids is not None}


class Operands(NamedTuple):
    """What `gate_forward` makes of a pass: qs, ks [b, t, h, k]; GL, GM [b, chunks, h, k]; amount [b, t, h]; G - Gm or None."""

    qs: Tensor
    ks: Tensor
    last: Tensor
    middle: Tensor
    amount: Tensor
    running: Tensor | None


def _wide(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _join(end: Tensor, keep: Tensor, first: Tensor | None, last: Tensor, block_v: int, reverse: bool) -> Tensor:
    """What each part starts from, [b h, parts, k, v]; `last` is filled with what the last one leaves."""
    start = torch.empty_like(end)
    bh, parts, k, v = end.shape
    walks.join_parts[(triton.cdiv(v, block_v) * bh,)](
        end, keep, end if first is None else first, start, last, parts,
        K=k, V=v, BK=padded(k), BV=block_v, HAS_FIRST=first is not None, REVERSE=reverse, num_warps=4,
    )  # fmt: skip
    return start


def operands(x: Inputs, chunk: int, keep: bool) -> Operands:
    """The one pass over gates and queries, in chunks of `chunk` tokens; `keep`: for a backward."""
    b, t, h, k, _ = x.sizes
    chunks = -(-t // chunk)
    # half a chunk's decay leaves fp16's range; fp32 has its precision
    form = torch.float32 if x.v.dtype == torch.float16 else x.v.dtype
    qs, ks = (torch.empty(b, t, h, k, dtype=form, device=x.v.device) for _ in range(2))
    last, middle = _wide(x.v, b, chunks, h, k), _wide(x.v, b, chunks, h, k)
    made = Operands(qs, ks, last, middle, _wide(x.v, b, t, h), _wide(x.v, b, t, h, k) if keep else None)
    warps = x.tiles().gate_warps
    kernels.gate_forward[(chunks * b * h,)](
        x.q, x.z, x.w, qs, ks, made.running, last, middle, made.amount, x.mask, token_stride(x.q), token_stride(x.z), t, h,
        K=k, BK=padded(k), C=chunk, RUN=metala_run(chunk, k, x.q.element_size(), warps), ROUND=x.gate_round,
        HAS_MASK=x.mask is not None, KEEP=keep, num_warps=warps,
    )  # fmt: skip
    return made


def states(x: Inputs, made: Operands, state: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    """States before every chunk of `chunk` tokens [b, n, h, k, v] in v's dtype, and the last one [b, h, k, v] in fp32."""
    b, t, h, k, v = x.sizes
    kept, final = x.v.new_empty(b, made.last.shape[1], h, k, v), _wide(x.v, b, h, k, v)

    def run(grid: tuple[int, int], begin: Tensor | None, end: Tensor, keep: Tensor, per: int, **flags: Any) -> None:
        walks.state_forward[grid](
            made.ks, x.v, made.last, made.middle, kept, begin, end, keep, x.segment_ids, token_stride(x.v), per, t, h,
            **flags, HAS_H0=begin is not None,
        )  # fmt: skip

    _walk(x, run, None if state is None else state.float().contiguous(), final, chunk, reverse=False)
    return kept, final


def state_gradients(x: Inputs, made: Operands, do: Tensor, dfinal: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    """Gradients of the state after every chunk [b, n, h, k, v] in v's dtype, and of the initial one [b, h, k, v] in fp32."""
    b, t, h, k, v = x.sizes
    dkept, dstate = x.v.new_empty(b, made.last.shape[1], h, k, v), _wide(x.v, b, h, k, v)

    def run(grid: tuple[int, int], begin: Tensor | None, end: Tensor, keep: Tensor, per: int, **flags: Any) -> None:
        walks.state_backward[grid](
            made.qs, do, made.last, made.middle, dkept, begin, end, keep, x.segment_ids, k**-0.5, per, t, h,
            **flags, HAS_DHT=begin is not None,
        )  # fmt: skip

    _walk(x, run, None if dfinal is None else dfinal.contiguous(), dstate, chunk, reverse=True)
    return dkept, dstate


def _walk(x: Inputs, run: Callable[..., None], start: Tensor | None, end: Tensor, chunk: int, reverse: bool) -> None:
    """Runs a kernel that walks over the chunks, from `start` [b, h, k, v] to `end`: once, or twice over parts side by side."""
    b, t, h, k, v = x.sizes
    tiles, chunks = x.tiles(), -(-t // chunk)
    columns = triton.cdiv(v, tiles.block_v)
    per = -(-chunks // parts_for(columns * b * h, chunks))
    parts = -(-chunks // per)
    common = x.constants(chunk, tiles.block_v) | {"num_warps": tiles.walk_warps, "num_stages": tiles.stages}
    grid = (columns * b * h, parts)
    if parts == 1:
        run(grid, start, end, end, per, **common, STORE=True, END=True, KEEP=False)
        return
    left, keep = _wide(x.v, b * h, parts, k, v), _wide(x.v, b * h, parts, k)
    run(grid, None, left, keep, per, **common, STORE=False, END=True, KEEP=True)
    begin = _join(left, keep, start, end, tiles.block_v, reverse)
    run(grid, begin, end, keep, per, **common, STORE=True, END=False, KEEP=False)


class Kept(NamedTuple):
    """What a forward leaves for its backward: normalised rows [b, t, h, v], and 1 / deviation of each row [b, t, h] in fp32."""

    normed: Tensor
    inverse: Tensor


def empty_kept(v: Tensor, keep: bool) -> Kept:
    """Room for what a forward over v [b, t, h, v] keeps; of no size where there is no backward."""
    shape = v.shape if keep else (0, *v.shape[1:])
    return Kept(v.new_empty(shape), v.new_empty(shape[:-1], dtype=torch.float32))


def forward(x: Inputs, state: Tensor | None, keep: bool) -> tuple[Tensor, Tensor, Kept]:
    """y [b, t, h, v] in v's dtype, the last state in fp32, and for `keep` what `backward` reads.

    Without tokens: nothing, and the initial state.
    """
    b, _, h, k, v = x.sizes
    y, kept = torch.empty(x.v.shape, dtype=x.v.dtype, device=x.v.device), empty_kept(x.v, keep)
    if y.numel() == 0:
        return y, _wide(x.v, b, h, k, v).zero_() if state is None else state.float().clone(), kept
    with device_guard(x.v):
        return y, _forward(x, state, y, kept if keep else None), kept


def _forward(x: Inputs, state: Tensor | None, y: Tensor, kept: Kept | None) -> Tensor:
    b, t, h, k, _ = x.sizes
    tiles = x.tiles()
    made = operands(x, tiles.chunk, keep=False)
    before, final = states(x, made, state, tiles.chunk)
    rows = tiles.rows or tiles.chunk
    kernels.output_forward[(before.shape[1] * (tiles.chunk // rows) * b * h,)](
        made.qs, made.ks, made.middle, made.amount, x.v, x.g, before, y, *(kept or (None, None)), x.segment_ids,
        token_stride(x.v), token_stride(x.g), token_stride(y), k**-0.5, EPS, t, h,
        **x.constants(tiles.chunk), R=rows, KEEP=kept is not None, num_warps=tiles.warps,
    )  # fmt: skip
    return final


def backward(
    x: Inputs, dy: Tensor, dfinal: Tensor | None, state: Tensor | None, kept: Kept, grads: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Fills `grads` (of q, z, v, g: dense heads and channels, any token stride); gives dw [h, k] and the initial state's."""
    b, _, h, k, v = x.sizes
    if dy.numel() == 0:
        dstate = _wide(x.v, b, h, k, v).zero_() if dfinal is None else dfinal.float().clone()
        return torch.zeros_like(x.w), dstate
    with device_guard(x.v):
        return _backward(x, dy, dfinal, state, kept, grads)


def _backward(
    x: Inputs, dy: Tensor, dfinal: Tensor | None, state: Tensor | None, kept: Kept, grads: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    b, t, h, k, v = x.sizes
    tiles, dy = x.tiles(), token_rows(dy)
    dq, dz, dv, dg = grads
    made = operands(x, tiles.back, keep=True)
    before, _ = states(x, made, state, tiles.back)
    do, damount = torch.empty(x.v.shape, dtype=x.v.dtype, device=x.v.device), _wide(x.v, b, t, h)
    rows, n = metala_rows(v), b * t * h
    kernels.output_backward[(triton.cdiv(n, rows),)](
        *kept, made.amount, x.v, x.g, dy, do, dg, damount,
        token_stride(x.v), token_stride(x.g), token_stride(dy), token_stride(dg), n, h,
        V=v, BV=padded(v), R=rows, num_warps=4,
    )  # fmt: skip
    after, dstate = state_gradients(x, made, do, dfinal, tiles.back)
    chunks = before.shape[1]
    dw = _wide(x.v, b, chunks, h, k)
    kernels.value_backward[(chunks * triton.cdiv(v, tiles.block_v) * b * h,)](
        made.qs, made.ks, made.last, made.middle, made.amount, x.v, after, do, dv, x.segment_ids,
        token_stride(x.v), token_stride(dv), k**-0.5, t, h,
        **x.constants(tiles.back, tiles.block_v), num_warps=tiles.value_warps,
    )  # fmt: skip
    kernels.input_backward[(chunks * b * h,)](
        made.qs, made.ks, made.running, made.last, made.middle, x.z, x.v, x.w, before, after, do, damount,
        dq, dz, dw, x.segment_ids, x.mask,
        token_stride(x.z), token_stride(x.v), token_stride(dq), token_stride(dz), k**-0.5, t, h,
        **x.constants(tiles.back, tiles.block_v), HAS_MASK=x.mask is not None,
        num_warps=tiles.back_warps, num_stages=tiles.stages,
    )  # fmt: skip
    return dw.sum((0, 1)).to(x.w.dtype), dstate
