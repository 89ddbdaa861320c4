"""How a parameter is sharded over tensor-parallel ranks, as data.

A layer declares one of these kinds per parameter. `parallel/tensor.py` shards, `checkpoint/` stores and reshards, and `export/`
gathers by it; there is no other table of parameter names. Nothing here needs torch.

    column      output rows are sharded: weight [out, in] on dim 0, bias [out] on dim 0
    row         input columns are sharded: weight [out, in] on dim 1 (one all-reduce sums the partial results)
    heads       contiguous blocks of heads on dim 0 of any tensor (self-augmentation vector, per-head decay)
    vocab       vocabulary rows on dim 0 (embedding table, output projection)
    replicated  equal on every rank
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ShardKind = Literal["column", "row", "heads", "vocab", "replicated"]
_DIM: dict[str, int | None] = {"column": 0, "row": 1, "heads": 0, "vocab": 0, "replicated": None}


@dataclass(frozen=True)
class Slice:
    """One rank's slice of a global tensor: `[start, stop)` on `dim`; `dim` None is the full tensor."""

    shape: tuple[int, ...]
    dim: int | None
    start: int
    stop: int

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the slice."""
        if self.dim is None:
            return self.shape
        return tuple(self.stop - self.start if i == self.dim else n for i, n in enumerate(self.shape))


def cut_dim(cut: ShardKind) -> int | None:
    """The sharded dimension; None for a replicated parameter."""
    return _DIM[cut]


def slice_of(shape: tuple[int, ...], cut: ShardKind, rank: int, size: int) -> Slice:
    """The slice of a global `shape` that tensor-parallel rank `rank` of `size` holds.

    Raises:
        ValueError: the dimension is not divisible by `size`.
    """
    dim = _DIM[cut]
    if dim is None or size == 1:
        return Slice(tuple(shape), None if dim is None else dim, 0, 0 if dim is None else shape[dim])
    if shape[dim] % size:
        raise ValueError(f"dimension {dim} of {tuple(shape)} cannot be split into {size} equal shards")
    length = shape[dim] // size
    return Slice(tuple(shape), dim, rank * length, (rank + 1) * length)


@dataclass(frozen=True)
class ParamSpec:
    """The properties of a parameter that do not depend on the mesh.

    Attributes:
        name: its logical name, also in an exported folder of our classes (`model.layers.0.token_mixer.q_proj.weight`).
        shape: the global shape.
        cut: how tensor parallelism shards it.
        role: initializer, see `model/init.py`.
        decay: weight decay applies.
        stage: index in the flat list of stages (NeoX's file number).
    """

    name: str
    shape: tuple[int, ...]
    cut: ShardKind
    role: str
    decay: bool
    stage: int
