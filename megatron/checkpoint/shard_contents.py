"""What one rank puts into a checkpoint: which tensors go into which file, and how the manifest describes them.

Weights are written by data-parallel rank 0, one file per stage and tensor-parallel rank; replicated ones stand in
the file of every tensor-parallel rank, so that a rank of the same mesh reads its own files only. Optimizer state is
written by whoever owns it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from megatron.checkpoint.layout import layer_file, optimizer_file, rng_file
from megatron.checkpoint.manifest import OptimizerPart, WeightEntry, WeightPart
from megatron.checkpoint.reshard import MASTER
from megatron.checkpoint.safetensors_writer import dtype_name, nbytes
from megatron.engine.base import Engine, OptimizerSlice
from megatron.parallel.mesh import Mesh
from megatron.parallel.random import capture_rng
from megatron.parallel.shard_spec import ParamSpec, Slice, slice_of


@dataclass
class ShardContents:
    """One rank's share. files: file name -> its tensors; the other two become entries of the manifest."""

    files: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    weights: dict[str, WeightEntry] = field(default_factory=dict)
    optimizer: dict[str, OptimizerPart] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes to be written, headers left out."""
        return sum(nbytes(tensors) for tensors in self.files.values())


def local_slice(spec: ParamSpec, mesh: Mesh) -> Slice:
    """The slice of a parameter that this rank holds."""
    return slice_of(spec.shape, spec.cut, mesh.tp_rank, mesh.tp)


def add_weights(holdings: ShardContents, weights: Mapping[str, Tensor], specs: Mapping[str, ParamSpec], mesh: Mesh) -> None:
    """Put this rank's local parts, logical name -> tensor, into the layer files."""
    files: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in weights.items():
        spec, part = specs[name], local_slice(specs[name], mesh)
        if tuple(tensor.shape) != part.local_shape:
            raise ValueError(f"'{name}' has shape {tuple(tensor.shape)}, its plan says {part.local_shape}")
        file = layer_file(spec.stage, mesh.tp_rank)
        files[file][name] = tensor
        entry = WeightPart(file, part.dim, part.start, part.stop)
        holdings.weights[name] = WeightEntry(tuple(spec.shape), dtype_name(tensor.dtype), spec.cut, spec.stage, (entry,))
    holdings.files.update(files)


def add_optimizer(
    holdings: ShardContents, slices: Mapping[str, OptimizerSlice], specs: Mapping[str, ParamSpec], mesh: Mesh
) -> None:
    """Put the optimizer slices that this rank owns into its optimizer file."""
    file = optimizer_file(mesh.dp_rank, mesh.pp_rank, mesh.tp_rank)
    tensors: dict[str, Tensor] = {}
    for name, own in slices.items():
        part = local_slice(specs[name], mesh)
        tensors[f"{MASTER}/{name}"] = own.master
        tensors.update({f"{moment}/{name}": value for moment, value in own.moments.items()})
        holdings.optimizer[name] = OptimizerPart(
            file=file,
            pp=mesh.pp_rank,
            tp=mesh.tp_rank,
            dim=part.dim,
            start=part.start,
            stop=part.stop,
            range_start=own.start,
            range_stop=own.stop,
            step=int(own.step),
            moments=tuple(sorted(own.moments)),
        )
    if tensors:
        holdings.files[file] = tensors


def _is_replica(slices: Mapping[str, OptimizerSlice], weights: Mapping[str, Tensor], mesh: Mesh) -> bool:
    """Without ZeRO every data-parallel rank owns everything; then only the first of them writes it."""
    whole = all(name in slices and (slices[name].start, slices[name].stop) == (0, t.numel()) for name, t in weights.items())
    return mesh.dp_rank > 0 and whole


def engine_holdings(engine: Engine, *, save_optimizer: bool, save_rng: bool) -> ShardContents:
    """All that this rank of a running engine writes."""
    mesh, holdings, weights = engine.mesh, ShardContents(), engine.weights()
    if mesh.dp_rank == 0:
        owned = {name: t for name, t in weights.items() if name not in engine.replica_names}
        add_weights(holdings, owned, engine.specs, mesh)
    if save_optimizer:
        slices = engine.optimizer_slices()
        if not _is_replica(slices, weights, mesh):
            add_optimizer(holdings, slices, engine.specs, mesh)
    if save_rng:
        holdings.files[rng_file(mesh.rank)] = capture_rng()
    return holdings
