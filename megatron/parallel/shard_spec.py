"""How a parameter is cut over tensor-parallel ranks, as data.

A layer says per parameter which of these it is; `parallel/tensor.py` cuts by it, `checkpoint/` stores and re-cuts by it,
`export/` joins by it. There is no second table of names. Nothing here needs torch.

    column      output rows are split: weight [out, in] on dim 0, bias [out] on dim 0
    row         input columns are split: weight [out, in] on dim 1 (partial sums are joined by one all-reduce)
    heads       contiguous blocks of heads on dim 0 of any tensor (self-augmentation vector, per-head decay)
    vocab       vocabulary rows on dim 0 (embedding table, output projection)
    replicated  the same on every rank
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

ShardKind = Literal["column", "row", "heads", "vocab", "replicated"]
Plan = Mapping[str, ShardKind]
_DIM: dict[str, int | None] = {"column": 0, "row": 1, "heads": 0, "vocab": 0, "replicated": None}


@dataclass(frozen=True)
class Slice:
    """The part of one global tensor that one rank holds: `[start, stop)` on `dim`; dim None is the whole tensor."""

    shape: tuple[int, ...]
    dim: int | None
    start: int
    stop: int

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        if self.dim is None:
            return self.shape
        return tuple(self.stop - self.start if i == self.dim else n for i, n in enumerate(self.shape))


def cut_dim(cut: ShardKind) -> int | None:
    """The dimension that a cut splits, None for a replicated parameter."""
    return _DIM[cut]


def slice_of(shape: tuple[int, ...], cut: ShardKind, rank: int, size: int) -> Slice:
    """The slice of a global `shape` held by tensor-parallel rank `rank` of `size`.

    Raises:
        ValueError: the dimension is not divisible by `size`; whoever builds the model checks this first.
    """
    dim = _DIM[cut]
    if dim is None or size == 1:
        return Slice(tuple(shape), None if dim is None else dim, 0, 0 if dim is None else shape[dim])
    if shape[dim] % size:
        raise ValueError(f"dimension {dim} of {tuple(shape)} cannot be cut in {size} equal parts")
    part = shape[dim] // size
    return Slice(tuple(shape), dim, rank * part, (rank + 1) * part)


@dataclass(frozen=True)
class ParamSpec:
    """What is true of one parameter on every mesh.

    name: its logical name, which is also its name in an exported folder (`model.layers.0.token_mixer.q_proj.weight`).
    shape: the global shape. cut: how tensor parallelism cuts it. role: initialiser role, see `model/init.py`.
    decay: whether weight decay applies. stage: index in the flat list of stages (NeoX's file number).
    """

    name: str
    shape: tuple[int, ...]
    cut: ShardKind
    role: str
    decay: bool
    stage: int
