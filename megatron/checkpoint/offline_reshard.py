"""Rewrites a checkpoint for another mesh, without an engine and without processes.

No run needs this, since loading reshards. It is for archiving and moving: fewer, larger files, or files sharded so that each
rank of the next run reads only its own. One rank's share is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from megatron.checkpoint import commit
from megatron.checkpoint.layout import rng_file
from megatron.checkpoint.load import read_slices
from megatron.checkpoint.manifest import Manifest, read_manifest
from megatron.checkpoint.regions import FlatRange
from megatron.checkpoint.reshard import MeshPosition
from megatron.checkpoint.rng_state import saved_rng_file
from megatron.checkpoint.safetensors_writer import write_files
from megatron.checkpoint.save import CheckpointMetadata, describe
from megatron.checkpoint.shard_contents import ShardContents, add_optimizer, add_weights, local_slice
from megatron.checkpoint.shard_manifests import write_shard_manifest
from megatron.checkpoint.tensor_reader import CheckpointReader
from megatron.engine.base import OptimizerSlice
from megatron.errors import CheckpointError
from megatron.files import sha256_of
from megatron.model.partition import stage_ranks
from megatron.parallel.mesh import Mesh
from megatron.parallel.shard_spec import ParamSpec


def specs_of(manifest: Manifest) -> dict[str, ParamSpec]:
    """The manifest's parameters as specs (role and weight decay are not stored and do not matter here)."""
    return {
        name: ParamSpec(name, entry.shape, entry.cut, "input", True, entry.stage)  # type: ignore[arg-type]
        for name, entry in manifest.weights.items()
    }


def _ranges(length: int, mesh: Mesh) -> tuple[int, int]:
    """A data-parallel rank's share of a flattened slice."""
    return length * mesh.dp_rank // mesh.dp, length * (mesh.dp_rank + 1) // mesh.dp


def _contents(reader: CheckpointReader, mesh: Mesh, specs: dict[str, ParamSpec], ranks: dict[int, int]) -> ShardContents:
    """What one rank of the new mesh writes."""
    manifest, contents, position = reader.manifest, ShardContents(), MeshPosition(mesh.pp_rank, mesh.tp_rank)
    names = [name for name, spec in specs.items() if ranks[spec.stage] == mesh.pp_rank]
    if mesh.dp_rank == 0:
        requests = (reader.weight_request(name, local_slice(specs[name], mesh), position) for name in names)
        weights: dict[str, Tensor] = dict(zip(names, reader.tensors(requests), strict=True))
        add_weights(contents, weights, specs, mesh)
    if manifest.optimizer:
        plans = {}
        for name in names:
            local = local_slice(specs[name], mesh)
            start, stop = _ranges(FlatRange.full(local).stop, mesh)
            if start < stop:
                plans[name] = reader.optimizer_reads(name, FlatRange(local, start, stop), position)
        slices: dict[str, OptimizerSlice] = read_slices(reader, plans)
        add_optimizer(contents, slices, specs, mesh)
    rng_source = saved_rng_file(manifest, mesh)
    if rng_source is not None:
        contents.files[rng_file(mesh.rank)] = reader.read_file(rng_source)
    return contents


def _meshes(pp: int, dp: int, tp: int) -> Iterator[Mesh]:
    return (Mesh(pp, dp, tp, rank) for rank in range(pp * dp * tp))


def reshard(path: str | Path, output: str | Path, *, pp: int, dp: int, tp: int) -> Path:
    """Rewrite a checkpoint for another mesh.

    Random number states are carried over if the pipeline and data-parallel sizes stay; otherwise the load reseeds, as always.

    Args:
        path: a `global_step<N>` folder.
        output: the save folder to write into.
        pp: pipeline-parallel size.
        dp: data-parallel size.
        tp: tensor-parallel size.

    Returns:
        `<output>/global_step<N>`.

    Raises:
        CheckpointError: the checkpoint is damaged, a size does not divide the model, or `output` is its own save folder.
    """
    path, output = Path(path), Path(output)
    manifest = read_manifest(path)
    if output.resolve() == path.resolve().parent:
        raise CheckpointError("a checkpoint cannot be resharded into its own save folder", where=str(output))
    specs = specs_of(manifest)
    try:
        num_layers = max(spec.stage for name, spec in specs.items() if ".layers." in name) - 1
        ranks = stage_ranks((spec.stage for spec in specs.values()), num_layers, pp)
        for spec in specs.values():
            local_slice(spec, Mesh(1, 1, tp, 0))
    except ValueError as error:
        raise CheckpointError(f"the model cannot be sharded for tensor size {tp}", where=str(path), why=str(error)) from error
    save_id = commit.new_save_id()
    temporary = commit.temporary_folder(output, manifest.iteration, save_id)
    output.mkdir(parents=True, exist_ok=True)
    commit.recover(output)
    commit.check_space(output, sum(entry.size for entry in manifest.files.values()))
    temporary.mkdir()
    try:
        with CheckpointReader(path, manifest) as reader:
            for mesh in _meshes(pp, dp, tp):
                contents = _contents(reader, mesh, specs, ranks)
                header = {"save_id": save_id, "iteration": str(manifest.iteration)}
                write_shard_manifest(temporary, mesh.rank, contents, write_files(temporary, contents.files, header))
        sizes = {"pp": pp, "dp": dp, "tp": tp}
        describe(temporary, sizes, save_id, manifest.state, _metadata(path, manifest), manifest.engine)
        return commit.publish(temporary, manifest.iteration)
    except BaseException as error:
        commit.discard(temporary)
        if isinstance(error, OSError):
            raise CheckpointError("the new checkpoint cannot be written", where=str(output), why=str(error)) from error
        raise


def _metadata(path: Path, manifest: Manifest) -> CheckpointMetadata:
    """Configs and tokenizer of the old checkpoint, verified."""
    texts, tokenizer = {}, {}
    for name, entry in manifest.files.items():
        folder, _, file = name.partition("/")
        if file and entry.blocks[0][1] != sha256_of(path / name):
            raise CheckpointError("a file of the checkpoint is damaged", where=str(path / name))
        if folder == "configs":
            texts[file] = (path / name).read_text(encoding="utf-8")
        elif folder == "tokenizer":
            tokenizer[file] = path / name
    return CheckpointMetadata(manifest.model_config, texts, tokenizer, manifest.facts)
