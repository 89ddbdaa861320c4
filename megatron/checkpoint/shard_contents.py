"""What one rank writes into a checkpoint: which tensors go into which file, and how the manifest describes them.

Data-parallel rank 0 writes the weights, one file per stage and tensor-parallel rank. Replicated weights are in the file of
every tensor-parallel rank, so that on the same mesh a rank reads only its own files. Each rank writes the optimizer state
that it owns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from megatron.checkpoint.layout import layer_file, optimizer_file, rng_file
from megatron.checkpoint.manifest import OptimizerShard, WeightEntry, WeightShard
from megatron.checkpoint.reshard import MASTER
from megatron.checkpoint.safetensors_writer import dtype_name, nbytes
from megatron.engine.base import Engine, OptimizerSlice
from megatron.parallel.mesh import Mesh
from megatron.parallel.random import capture_rng
from megatron.parallel.shard_spec import ParamSpec, Slice, slice_of


@dataclass
class ShardContents:
    """What one rank writes.

    Attributes:
        files: file name -> its tensors by name.
        weights: manifest entries of its weights.
        optimizer: manifest entries of its optimizer state.
    """

    files: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    weights: dict[str, WeightEntry] = field(default_factory=dict)
    optimizer: dict[str, OptimizerShard] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes to write, without headers."""
        return sum(nbytes(tensors) for tensors in self.files.values())


def local_slice(spec: ParamSpec, mesh: Mesh) -> Slice:
    """The slice of a parameter that this rank holds."""
    return slice_of(spec.shape, spec.cut, mesh.tp_rank, mesh.tp)


def add_weights(contents: ShardContents, weights: Mapping[str, Tensor], specs: Mapping[str, ParamSpec], mesh: Mesh) -> None:
    """Put this rank's local tensors into the layer files.

    Args:
        contents: extended in place.
        weights: logical name -> local tensor.
        specs: logical name -> global shape and sharding.
        mesh: this rank's position.

    Raises:
        ValueError: a local shape differs from its spec.
    """
    files: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in weights.items():
        spec, local = specs[name], local_slice(specs[name], mesh)
        if tuple(tensor.shape) != local.local_shape:
            raise ValueError(f"'{name}' has shape {tuple(tensor.shape)}, its plan says {local.local_shape}")
        file = layer_file(spec.stage, mesh.tp_rank)
        files[file][name] = tensor
        shard = WeightShard(file, local.dim, local.start, local.stop)
        contents.weights[name] = WeightEntry(tuple(spec.shape), dtype_name(tensor.dtype), spec.cut, spec.stage, (shard,))
    contents.files.update(files)


def add_optimizer(
    contents: ShardContents, slices: Mapping[str, OptimizerSlice], specs: Mapping[str, ParamSpec], mesh: Mesh
) -> None:
    """Put the optimizer slices that this rank owns into its optimizer file."""
    file = optimizer_file(mesh.dp_rank, mesh.pp_rank, mesh.tp_rank)
    tensors: dict[str, Tensor] = {}
    for name, owned in slices.items():
        local = local_slice(specs[name], mesh)
        tensors[f"{MASTER}/{name}"] = owned.master
        tensors.update({f"{moment}/{name}": value for moment, value in owned.moments.items()})
        contents.optimizer[name] = OptimizerShard(
            file=file,
            pp=mesh.pp_rank,
            tp=mesh.tp_rank,
            dim=local.dim,
            start=local.start,
            stop=local.stop,
            range_start=owned.start,
            range_stop=owned.stop,
            step=int(owned.step),
            moments=tuple(sorted(owned.moments)),
        )
    if tensors:
        contents.files[file] = tensors


def _is_replica(slices: Mapping[str, OptimizerSlice], weights: Mapping[str, Tensor], mesh: Mesh) -> bool:
    """Whether another rank writes the same state: without ZeRO every data-parallel rank owns all of it, and rank 0 writes."""
    full = all(name in slices and (slices[name].start, slices[name].stop) == (0, t.numel()) for name, t in weights.items())
    return mesh.dp_rank > 0 and full


def collect_contents(engine: Engine, *, save_optimizer: bool, save_rng: bool) -> ShardContents:
    """Everything that this rank of a running engine writes."""
    mesh, contents, weights = engine.mesh, ShardContents(), engine.weights()
    if mesh.dp_rank == 0:
        owned = {name: t for name, t in weights.items() if name not in engine.replica_names}
        add_weights(contents, owned, engine.specs, mesh)
    if save_optimizer:
        slices = engine.optimizer_slices()
        if not _is_replica(slices, weights, mesh):
            add_optimizer(contents, slices, engine.specs, mesh)
    if save_rng:
        contents.files[rng_file(mesh.rank)] = capture_rng()
    return contents
