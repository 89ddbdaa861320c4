"""Sequence parallelism of the norm regions: between tensor-parallel regions each rank holds its own piece of the sequence.

The two all-reduces of a block become a gather and a reduce-scatter each, which send as many bytes, and norms, residual stream
and the activations kept for them shrink by the tensor-parallel size (Megatron's sequence parallelism, arXiv 2205.05198). A
mixer needs the whole sequence: it is gathered in front of it, short convolution included, and partial sums leave it scattered.

Every parameter that is not cut then sees a part of the work on each rank: a norm its piece of the sequence, a convolution in
front of the heads the gradient of its rank's heads. Their gradients are summed over the ranks as they are made, which is exact
because back-propagation is linear in the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron.errors import ConfigError
from megatron.layers.base import Layer
from megatron.ops.precision import outside_autocast
from megatron.parallel.collectives import tp_sum
from megatron.parallel.shard_spec import ParamSpec


def gather_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """Pieces [b, s / t, d] -> [b, s, d] on every rank."""
    piece = x.transpose(0, 1).contiguous()
    whole = piece.new_empty((piece.shape[0] * dist.get_world_size(group), *piece.shape[1:]))
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
    gather(whole, piece, group=group)
    return whole.transpose(0, 1).contiguous()


def scatter_sum(x: Tensor, group: ProcessGroup, wide: bool) -> Tensor:
    """Partial sums [b, s, d] -> this rank's piece [b, s / t, d] of their sum; formed in fp32 when `wide` and x is narrower."""
    whole = x.float() if wide and x.element_size() < 4 else x
    whole = whole.transpose(0, 1).contiguous()
    piece = whole.new_empty((whole.shape[0] // dist.get_world_size(group), *whole.shape[1:]))
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # renamed in torch 2.13
    scatter(piece, whole, group=group)
    return piece.transpose(0, 1).contiguous().to(x.dtype)


@outside_autocast
class _Gather(torch.autograd.Function):
    """Gather forward, reduce-scatter backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, wide: bool) -> Tensor:
        ctx.group, ctx.wide = group, wide
        return gather_sequence(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return scatter_sum(grads[0], ctx.group, ctx.wide), None, None


@outside_autocast
class _ScatterSum(torch.autograd.Function):
    """Reduce-scatter forward, gather backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, wide: bool) -> Tensor:
        ctx.group = group
        return scatter_sum(x, group, wide)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return gather_sequence(grads[0], ctx.group), None, None


class GatherSequence(nn.Module):
    """Entry of a tensor-parallel region: the whole sequence; the partial gradients of the ranks are summed on the way back."""

    def __init__(self, group: ProcessGroup, wide: bool = False) -> None:
        super().__init__()
        self.group, self.wide = group, wide

    def forward(self, x: Tensor) -> Tensor:
        """[b, s / t, d] -> [b, s, d]."""
        return _Gather.apply(x, self.group, self.wide)

    def before(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """As a forward pre-hook: the module gets the whole sequence."""
        return (self(arguments[0]), *arguments[1:])


class ScatterSequence(nn.Module):
    """Exit of a tensor-parallel region: this rank's piece of the summed result."""

    def __init__(self, group: ProcessGroup, wide: bool = False) -> None:
        super().__init__()
        self.group, self.wide = group, wide

    def forward(self, x: Tensor) -> Tensor:
        """Partial [b, s, d] -> [b, s / t, d]."""
        return _ScatterSum.apply(x, self.group, self.wide)


def check_sequence_parallel(model: nn.Module, specs: Mapping[str, ParamSpec], tp: int, seq_length: int, dropout: float) -> None:
    """Refuse what would not be exact; nothing to refuse on one tensor-parallel rank.

    Raises:
        ConfigError: a sequence that does not divide, dropout, learned positions, or a mixer that sums over the ranks inside.
    """
    if tp == 1:
        return
    if seq_length % tp:
        raise _refused(f"seq_length {seq_length} cannot be cut over model_parallel_size {tp}")
    if dropout > 0:
        raise _refused("hidden_dropout would not drop the same activations as without it")
    if any(name.endswith(".positions") for name in specs):
        raise _refused("learned positions are added to the whole sequence")
    for module in model.modules():
        if isinstance(module, Layer) and module.tp_reductions > 1:
            why = f"{type(module).__name__} sums over the ranks {module.tp_reductions} times, inside its own sequence"
            raise _refused(why)


def _refused(why: str) -> ConfigError:
    return ConfigError("sequence_parallel cannot be exact here", why=why, hint="sequence_parallel: false")


def cut_sequence(model: nn.Module, specs: Mapping[str, ParamSpec], group: ProcessGroup, wide: bool) -> None:
    """Put the collectives into a model whose parameters are cut already: regions with both ends, embedding, output
    projection."""
    for module in list(model.modules()):
        both = "copy_to_tp" in module._modules and "reduce_from_tp" in module._modules
        if both:
            module.copy_to_tp = nn.Identity()
            module.register_forward_pre_hook(GatherSequence(group, wide).before)
        elif "copy_to_tp" in module._modules:
            module.copy_to_tp = GatherSequence(group, wide)
        if "reduce_from_tp" in module._modules:
            module.reduce_from_tp = ScatterSequence(group, wide)


def sum_replicated_gradients(
    parameters: Mapping[str, nn.Parameter], specs: Mapping[str, ParamSpec], group: ProcessGroup
) -> None:
    """From now on gradients of parameters that are not cut are summed over the ranks, in fp32, as they are made."""
    for name, param in parameters.items():
        if specs[name].cut == "replicated":
            param.register_hook(lambda grad: tp_sum(grad, group, wide=True))
