"""Write a checkpoint again for another mesh, without an engine and without processes.

No run needs this, since loading re-cuts. It is for moving: fewer, larger files, or files cut so that each rank of the next
run reads its own only. One rank's share is in memory at a time.
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
from megatron.checkpoint.reshard import Place
from megatron.checkpoint.rng_state import saved_streams
from megatron.checkpoint.safetensors_writer import write_files
from megatron.checkpoint.save import CheckpointMetadata, describe
from megatron.checkpoint.shard_contents import ShardContents, add_optimizer, add_weights, local_slice
from megatron.checkpoint.shard_manifests import write_receipt
from megatron.checkpoint.tensor_reader import Source
from megatron.engine.base import OptimizerSlice
from megatron.errors import CheckpointError
from megatron.files import sha256_of
from megatron.model.partition import stage_ranks
from megatron.parallel.mesh import Mesh
from megatron.parallel.shard_spec import ParamSpec


def specs_of(manifest: Manifest) -> dict[str, ParamSpec]:
    """What the manifest knows of each parameter, as specs (role and decay are not stored and do not matter here)."""
    found = {}
    for name, entry in manifest.weights.items():
        found[name] = ParamSpec(name, entry.shape, entry.cut, "input", True, entry.stage)  # type: ignore[arg-type]
    return found


def _ranges(length: int, mesh: Mesh) -> tuple[int, int]:
    """A data-parallel rank's share of a flattened slice."""
    return length * mesh.dp_rank // mesh.dp, length * (mesh.dp_rank + 1) // mesh.dp


def _holdings(source: Source, mesh: Mesh, specs: dict[str, ParamSpec], ranks: dict[int, int]) -> ShardContents:
    """What one rank of the new mesh writes."""
    manifest, holdings, place = source.manifest, ShardContents(), Place(mesh.pp_rank, mesh.tp_rank)
    own = [name for name, spec in specs.items() if ranks[spec.stage] == mesh.pp_rank]
    if mesh.dp_rank == 0:
        wanted = (source.wanted_weight(name, local_slice(specs[name], mesh), place) for name in own)
        weights: dict[str, Tensor] = dict(zip(own, source.tensors(wanted), strict=True))
        add_weights(holdings, weights, specs, mesh)
    if manifest.optimizer:
        plans = {}
        for name in own:
            part = local_slice(specs[name], mesh)
            start, stop = _ranges(FlatRange.whole(part).stop, mesh)
            if start < stop:
                plans[name] = source.optimizer_reads(name, FlatRange(part, start, stop), place)
        slices: dict[str, OptimizerSlice] = read_slices(source, plans)
        add_optimizer(holdings, slices, specs, mesh)
    streams = saved_streams(manifest, mesh)
    if streams is not None:
        holdings.files[rng_file(mesh.rank)] = source.whole_file(streams)
    return holdings


def _meshes(pp: int, dp: int, tp: int) -> Iterator[Mesh]:
    return (Mesh(pp, dp, tp, rank) for rank in range(pp * dp * tp))


def reshard(path: str | Path, output: str | Path, *, pp: int, dp: int, tp: int) -> Path:
    """Write the checkpoint at `path` again for `pp x dp x tp` processes, below the save folder `output`.

    Random numbers are carried over where pipeline and data sizes stay; elsewhere they begin again at the load, as always.

    Returns:
        `<output>/global_step<N>`.

    Raises:
        CheckpointError: damage in what is read, a size that does not divide, or `output` is the checkpoint's own folder.
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
        raise CheckpointError(f"the model cannot be cut for tensor size {tp}", where=str(path), why=str(error)) from error
    save_id = commit.new_save_id()
    temporary = commit.temporary_folder(output, manifest.iteration, save_id)
    output.mkdir(parents=True, exist_ok=True)
    commit.recover(output)
    commit.check_space(output, sum(entry.size for entry in manifest.files.values()))
    temporary.mkdir()
    try:
        with Source(path, manifest) as source:
            for mesh in _meshes(pp, dp, tp):
                holdings = _holdings(source, mesh, specs, ranks)
                header = {"save_id": save_id, "iteration": str(manifest.iteration)}
                write_receipt(temporary, mesh.rank, holdings, write_files(temporary, holdings.files, header))
        sizes = {"pp": pp, "dp": dp, "tp": tp}
        describe(temporary, sizes, save_id, manifest.state, _companions(path, manifest), manifest.engine)
        return commit.publish(temporary, manifest.iteration)
    except BaseException as error:
        commit.discard(temporary)
        if isinstance(error, OSError):
            raise CheckpointError("the new checkpoint cannot be written", where=str(output), why=str(error)) from error
        raise


def _companions(path: Path, manifest: Manifest) -> CheckpointMetadata:
    """Configs and tokenizer of the old one, checked."""
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
