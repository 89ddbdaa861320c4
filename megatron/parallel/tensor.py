"""Cuts a model that was written for one device into one tensor-parallel rank's part.

The parameters' `ParamSpec.cut` says how each is cut; nothing here knows a layer's name. It works on the meta device, so that a
rank never holds more than its own part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from megatron.errors import ConfigError
from megatron.layers.base import Layer
from megatron.parallel.collectives import CopyToTP, ReduceFromTP
from megatron.parallel.mesh import Mesh
from megatron.parallel.sequence import cut_sequence
from megatron.parallel.shard_spec import ParamSpec, Slice, slice_of


def local_slice(spec: ParamSpec, mesh: Mesh) -> Slice:
    """The part of `spec` that this rank holds.

    Raises:
        ConfigError: the cut dimension is not divisible by the tensor-parallel size.
    """
    try:
        return slice_of(spec.shape, spec.cut, mesh.tp_rank, mesh.tp)
    except ValueError as error:
        raise ConfigError(
            f"'{spec.name}' cannot be split over model_parallel_size {mesh.tp}",
            why=str(error),
            hint="heads, MLP width and padded vocabulary must be multiples of model_parallel_size",
        ) from None


def take(full: Tensor, part: Slice) -> Tensor:
    """The part of a full tensor, as a contiguous copy; the tensor itself when the part is the whole."""
    if part.dim is None or part.stop - part.start == part.shape[part.dim]:
        return full
    return full.narrow(part.dim, part.start, part.stop - part.start).contiguous()


def replace_parameters(modules: Iterable[nn.Module], new: Mapping[int, nn.Parameter]) -> None:
    """Put `new[id(old)]` wherever `old` stands, in every module that shares it (tied weights stay tied)."""
    for module in modules:
        for child in module.modules():
            for name, param in child._parameters.items():
                if param is not None and id(param) in new:
                    child._parameters[name] = new[id(param)]


def shard_model(
    model: nn.Module, specs: Mapping[str, ParamSpec], mesh: Mesh, fp32_allreduce: bool = False, sequence_parallel: bool = False
) -> None:
    """Replace every parameter by this rank's part and put the collectives into `split` and `join`, in place.

    Args:
        model: its `named_parameters()` are named as in `specs`; on the meta device or with values.
        mesh: tensor size 1 leaves the model as it is. fp32_allreduce: form sums of narrower activations in fp32.
        sequence_parallel: norm regions hold a piece of the sequence (`sequence.py`).

    Raises:
        ConfigError: a dimension does not divide.
        KeyError: a parameter has no spec.
    """
    if mesh.tp == 1:
        return
    new: dict[int, nn.Parameter] = {}
    for name, param in model.named_parameters():
        part = take(param.detach(), local_slice(specs[name], mesh))
        new[id(param)] = nn.Parameter(part.clone(), requires_grad=param.requires_grad)
    replace_parameters([model], new)
    set_part_sizes(model)
    _set_collectives(model, specs, mesh, fp32_allreduce)
    if sequence_parallel and mesh.tp_group is not None:
        cut_sequence(model, specs, mesh.tp_group, fp32_allreduce)


def set_part_sizes(model: nn.Module) -> None:
    """Let matrices and convolutions say the sizes of their parts, which mixers read their head counts from."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.Conv1d):
            module.out_channels = module.in_channels = module.groups = module.weight.shape[0]


def _set_collectives(model: nn.Module, specs: Mapping[str, ParamSpec], mesh: Mesh, wide: bool) -> None:
    """Fill every `split`, `join` and `first_row`, and tell every mixer which part it is."""
    if mesh.tp_group is None:
        return  # a mesh that only plans: shapes are cut, nothing will be run
    for name, module in list(model.named_modules()):
        if "copy_to_tp" in module._modules:
            module.copy_to_tp = CopyToTP(mesh.tp_group, wide)
        if "reduce_from_tp" in module._modules:
            module.reduce_from_tp = ReduceFromTP(mesh.tp_group, wide)
        if hasattr(module, "first_row"):
            module.first_row = local_slice(specs[f"{name}.weight"], mesh).start
        if isinstance(module, Layer):
            module.set_shard(mesh.tp_rank, mesh.tp)


def same_on_all_ranks(tensors: Mapping[str, Tensor], mesh: Mesh) -> list[str]:
    """Names whose tensors are not bit-equal over the tensor-parallel ranks; for checks and tests."""
    if mesh.tp_group is None:
        return []
    bad = []
    for name, tensor in tensors.items():
        parts = [torch.empty_like(tensor) for _ in range(mesh.tp)]
        torch.distributed.all_gather(parts, tensor.detach().contiguous(), group=mesh.tp_group)
        if any(not torch.equal(part, tensor.detach()) for part in parts):
            bad.append(name)
    return bad
