"""Shards a model that was written for one device: keeps one tensor-parallel rank's shard of every parameter.

`ParamSpec.cut` defines how a parameter is sharded; nothing here depends on the names of layers. It also works on the meta
device, so that a rank never allocates more than its own shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from megatron.errors import ConfigError
from megatron.layers.base import Layer
from megatron.parallel.collectives import CopyToTP, ReduceFromTP
from megatron.parallel.mesh import Mesh
from megatron.parallel.sequence import install_sequence_parallel
from megatron.parallel.shard_spec import ParamSpec, Slice, slice_of


def local_slice(spec: ParamSpec, mesh: Mesh) -> Slice:
    """The slice of a parameter that this rank holds.

    Raises:
        ConfigError: the sharded dimension is not divisible by the tensor-parallel size.
    """
    try:
        return slice_of(spec.shape, spec.cut, mesh.tp_rank, mesh.tp)
    except ValueError as error:
        raise ConfigError(
            f"'{spec.name}' cannot be split over model_parallel_size {mesh.tp}",
            why=str(error),
            hint="heads, MLP width and padded vocabulary must be multiples of model_parallel_size",
        ) from None


def take(full: Tensor, local: Slice) -> Tensor:
    """A slice of a full tensor as a contiguous copy; the tensor itself if the slice covers it."""
    if local.dim is None or local.stop - local.start == local.shape[local.dim]:
        return full
    return full.narrow(local.dim, local.start, local.stop - local.start).contiguous()


def replace_parameters(modules: Iterable[nn.Module], new: Mapping[int, nn.Parameter]) -> None:
    """Replace every parameter `old` by `new[id(old)]` in all modules that share it, so that tied weights stay tied."""
    for module in modules:
        for child in module.modules():
            for name, param in child._parameters.items():
                if param is not None and id(param) in new:
                    child._parameters[name] = new[id(param)]


def shard_model(
    model: nn.Module, specs: Mapping[str, ParamSpec], mesh: Mesh, fp32_allreduce: bool = False, sequence_parallel: bool = False
) -> None:
    """Replace every parameter by this rank's shard and install the collectives, in place.

    Args:
        model: its `named_parameters()` are named as in `specs`; on the meta device or with values.
        specs: name -> sharding.
        mesh: the mesh; with tensor-parallel size 1 the model is not changed.
        fp32_allreduce: sum 16-bit activations in fp32.
        sequence_parallel: norm regions compute on a shard of the sequence (`sequence.py`).

    Raises:
        ConfigError: a sharded dimension is not divisible by the tensor-parallel size.
        KeyError: a parameter has no spec.
    """
    if mesh.tp == 1:
        return
    new: dict[int, nn.Parameter] = {}
    for name, param in model.named_parameters():
        shard = take(param.detach(), local_slice(specs[name], mesh))
        new[id(param)] = nn.Parameter(shard.clone(), requires_grad=param.requires_grad)
    replace_parameters([model], new)
    set_part_sizes(model)
    _set_collectives(model, specs, mesh, fp32_allreduce)
    if sequence_parallel and mesh.tp_group is not None:
        install_sequence_parallel(model, specs, mesh.tp_group, fp32_allreduce)


def set_part_sizes(model: nn.Module) -> None:
    """Set the size attributes of linear layers and convolutions to their shards'; mixers derive head counts from them."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.Conv1d):
            module.out_channels = module.in_channels = module.groups = module.weight.shape[0]


def _set_collectives(model: nn.Module, specs: Mapping[str, ParamSpec], mesh: Mesh, wide: bool) -> None:
    """Set every `copy_to_tp`, `reduce_from_tp` and `first_row`, and pass every mixer its shard's number."""
    if mesh.tp_group is None:
        return  # a mesh for planning only: shapes are sharded, nothing runs
    for name, module in list(model.named_modules()):
        if "copy_to_tp" in module._modules:
            module.copy_to_tp = CopyToTP(mesh.tp_group, wide)
        if "reduce_from_tp" in module._modules:
            module.reduce_from_tp = ReduceFromTP(mesh.tp_group, wide)
        if hasattr(module, "first_row"):
            module.first_row = local_slice(specs[f"{name}.weight"], mesh).start
        if isinstance(module, Layer):
            module.set_shard(mesh.tp_rank, mesh.tp)
