"""Tile sizes of the fused kernels by architecture, precision and width: a committed table instead of minutes of autotuning.

Each entry has at most six sets of tile sizes; the first is used. Their order follows from the compiled kernels on sm_90
(registers, spills, shared memory: `tools/bench/kernels_aot.py`, whose limits a test checks for every set in this table) and
from the bytes that they move; the part `cuts` of `tools/bench/gpu_kit.py` times similar tile sizes on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of the MetaLA kernels.

    chunk: tokens between stored states forward, and rows of an output tile. back: the same for the backward.
    block_v: value columns per program of the kernels that walk over chunks, and per step of the input gradients.
    rows: rows of a chunk in one program of the output kernel; 0 for all of them.
    warps, value_warps, back_warps: of the output kernel, of the gradients of values, and of those of queries and gates.
    walk_warps, gate_warps: of the kernels that walk over chunks, and of the gates.
    stages: tiles in flight of the kernels that walk.
    """

    chunk: int
    back: int
    block_v: int
    warps: int
    back_warps: int = 8
    value_warps: int = 4
    walk_warps: int = 4
    gate_warps: int = 4
    stages: int = 3
    rows: int = 0


ARCHITECTURE = "sm_90"
"""The only architecture with entries; others use the same tile sizes."""

# (architecture, bytes per element, key width of a head rounded up to a power of two); the value width is twice the key width.
METALA: Mapping[tuple[str, int, int], tuple[Tiles, ...]] = {
    ("sm_90", 2, 16): (Tiles(64, 64, 32, 4, 4, gate_warps=2),),
    ("sm_90", 2, 32): (Tiles(64, 64, 64, 4, gate_warps=2),),
    # back_warps 4 spills but is still faster: 301 us of an H100 (16 heads), 8 warps without spills 356
    ("sm_90", 2, 64): (Tiles(64, 64, 64, 4, 4),),
    ("sm_90", 2, 128): (Tiles(32, 32, 64, 8),),
    # 32 rows: with products of 64 rows in 8 warps the input gradients read outside of their memory on a GPU (Triton 3.6.0)
    ("sm_90", 4, 16): (Tiles(32, 32, 32, 8, gate_warps=2, stages=2),),
    ("sm_90", 4, 32): (Tiles(32, 16, 32, 8, gate_warps=2, stages=2),),
    ("sm_90", 4, 64): (Tiles(16, 16, 32, 8, gate_warps=2, stages=2),),
    ("sm_90", 4, 128): (Tiles(16, 16, 32, 8, walk_warps=8, stages=2),),
}


def padded(width: int) -> int:
    """`width` rounded up to a power of two; at least 16, the smallest side of a matrix product."""
    return max(16, 1 << (width - 1).bit_length())


_WIDEST = max(width for _, _, width in METALA)


def _entry_width(key_dim: int, value_dim: int) -> int:
    return max(padded(key_dim), padded(value_dim) // 2)


def metala_fits(key_dim: int, value_dim: int) -> bool:
    """Whether the fused kernels take heads of these widths."""
    return _entry_width(key_dim, value_dim) <= _WIDEST


def metala_cuts(key_dim: int, value_dim: int, size: int) -> tuple[Tiles, ...]:
    """The cuts for heads of these widths in elements of `size` bytes, the one to use first.

    Raises:
        ValueError: wider heads than any entry has.
    """
    entry = METALA.get((ARCHITECTURE, size, _entry_width(key_dim, value_dim)))
    if entry is None:
        raise ValueError(f"the fused kernels take heads of up to {_WIDEST} x {2 * _WIDEST}, not {key_dim} x {value_dim}")
    return entry


@dataclass(frozen=True)
class TaylorTiles:
    """Tile sizes of the Taylor kernels.

    chunk: tokens between stored states, and rows of an output tile.
    walk_rows, walk_columns: features and values per program of the kernel that walks over chunks.
    rows, back_rows: features per step of the kernels that process one chunk per program, forward and backward.
    walk_warps, warps, back_warps: of these three. stages: tiles in flight.
    """

    chunk: int = 64
    walk_rows: int = 64
    walk_columns: int = 64
    rows: int = 32
    back_rows: int = 32
    walk_warps: int = 4
    warps: int = 4
    back_warps: int = 4
    stages: int = 3


# (architecture, dtype of the model, width of the values of a head rounded up to a power of two); fp16 and fp32 multiply in
# fp32, whose operands take more registers: fp32 by three products each.
TAYLOR: Mapping[tuple[str, str, int], TaylorTiles] = {
    ("sm_90", "bf16", 16): TaylorTiles(),
    ("sm_90", "bf16", 32): TaylorTiles(),
    ("sm_90", "bf16", 64): TaylorTiles(),
    ("sm_90", "bf16", 128): TaylorTiles(back_rows=16),
    **{("sm_90", "fp16", v): TaylorTiles(chunk=32, back_rows=16, stages=2) for v in (16, 32, 64, 128)},
    **{("sm_90", "fp32", v): TaylorTiles(chunk=16, back_rows=16, back_warps=8, stages=2) for v in (16, 32, 64, 128)},
}


def taylor_cut(value_dim: int, form: str) -> TaylorTiles:
    """Tile sizes for values of this width in a model of this dtype (bf16, fp16, fp32)."""
    return TAYLOR[ARCHITECTURE, form, padded(value_dim)]


def taylor_step_cut(features: int, value_dim: int) -> tuple[int, int]:
    """(features at a time, warps) of the decode step: all if they fit into registers, with every load in flight at once."""
    rows, columns = padded(features), padded(value_dim)
    return rows if rows * columns <= 256 * 64 else 8192 // columns, 8


def norm_cut(d: int) -> tuple[int, int]:
    """(rows per program, warps) of the norm kernels: about 4,096 numbers, or one row of more, in the registers of a program."""
    width = padded(d)
    return max(1, 4096 // width), 4 if width <= 1024 else 8 if width <= 4096 else 16


def gated_cut(d: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program of the gated MLP's kernels: 4,096 numbers, 16 bytes of a row at a time per thread."""
    columns = min(1024, padded(d))
    return 4096 // columns, columns, 8


def metala_run(chunk: int, key_dim: int, size: int, warps: int) -> int:
    """Consecutive tokens of a chunk in one thread of the gates' kernel: a power of two.

    A thread reads 16 bytes of a row and the warps read distinct rows at once; the others of its chunk are the rows next to its
    first, so that most of the cumulative sum stays within its registers.

    Args:
        chunk: tokens of a chunk.
        key_dim: key width of a head.
        size: bytes of an element.
        warps: warps of a program.
    """
    return max(1, chunk * padded(key_dim) * size // (warps * 32 * 16))


def metala_rows(v: int) -> int:
    """Rows per program of the backward of MetaLA's norm and gates: about 2,048 numbers, 16 in each thread of 4 warps."""
    return max(1, 2048 // padded(v))


CROSS_ENTROPY = (2048, 8)
"""(columns at a time, warps) of the cross-entropy kernels."""
