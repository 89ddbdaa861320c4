"""Sequence parallelism of the norm regions: between tensor-parallel regions each rank holds its own shard of the sequence.

Each of the two all-reduces of a block becomes an all-gather and a reduce-scatter, which send the same number of bytes; norms,
residual stream and their saved activations shrink by the tensor-parallel size (Megatron's sequence parallelism, arXiv
2205.05198). A mixer, with its short convolution, needs the full sequence: it is gathered before the mixer, and the partial sums
are scattered after it.

Every replicated parameter then has a partial gradient on each rank: a norm that of its shard of the sequence, a convolution
before the heads that of its rank's heads. These gradients are summed over the ranks as they are computed, which is exact
because backpropagation is linear in the gradient.
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
    """Shards [b, s / t, d] -> [b, s, d] on every rank."""
    shard = x.transpose(0, 1).contiguous()
    full = shard.new_empty((shard.shape[0] * dist.get_world_size(group), *shard.shape[1:]))
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
    gather(full, shard, group=group)
    return full.transpose(0, 1).contiguous()


def scatter_sum(x: Tensor, group: ProcessGroup, wide: bool) -> Tensor:
    """Partial sums [b, s, d] -> this rank's shard [b, s / t, d] of their sum; in fp32 if `wide` is set and x has 16 bits."""
    full = x.float() if wide and x.element_size() < 4 else x
    full = full.transpose(0, 1).contiguous()
    shard = full.new_empty((full.shape[0] // dist.get_world_size(group), *full.shape[1:]))
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # renamed in torch 2.13
    scatter(shard, full, group=group)
    return shard.transpose(0, 1).contiguous().to(x.dtype)


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
    """Entry of a tensor-parallel region: the full sequence; the backward sums the ranks' partial gradients."""

    def __init__(self, group: ProcessGroup, wide: bool = False) -> None:
        super().__init__()
        self.group, self.wide = group, wide

    def forward(self, x: Tensor) -> Tensor:
        """[b, s / t, d] -> [b, s, d]."""
        return _Gather.apply(x, self.group, self.wide)

    def before(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """A forward pre-hook that passes the full sequence to the module."""
        return (self(arguments[0]), *arguments[1:])


class ScatterSequence(nn.Module):
    """Exit of a tensor-parallel region: this rank's shard of the summed result."""

    def __init__(self, group: ProcessGroup, wide: bool = False) -> None:
        super().__init__()
        self.group, self.wide = group, wide

    def forward(self, x: Tensor) -> Tensor:
        """Partial [b, s, d] -> [b, s / t, d]."""
        return _ScatterSum.apply(x, self.group, self.wide)


def check_sequence_parallel(model: nn.Module, specs: Mapping[str, ParamSpec], tp: int, seq_length: int, dropout: float) -> None:
    """Reject models that sequence parallelism cannot compute exactly; with one tensor-parallel rank every model is allowed.

    Args:
        model: the model, whose mixers are checked.
        specs: parameter name -> spec.
        tp: tensor-parallel size.
        seq_length: tokens of a sequence.
        dropout: dropout probability of the hidden states.

    Raises:
        ConfigError: the sequence length is not divisible, the model has dropout or learned positions, or a mixer has additional
            reductions over ranks.
    """
    if tp == 1:
        return
    if seq_length % tp:
        raise _refused(f"seq_length {seq_length} is not divisible by model_parallel_size {tp}")
    if dropout > 0:
        raise _refused("hidden_dropout would not drop the same activations as without it")
    if any(name.endswith(".positions") for name in specs):
        raise _refused("learned positions are added to the full sequence")
    for module in model.modules():
        if isinstance(module, Layer) and module.tp_reductions > 1:
            reason = f"{type(module).__name__} sums over the ranks {module.tp_reductions} times, inside its own sequence"
            raise _refused(reason)


def _refused(reason: str) -> ConfigError:
    return ConfigError("sequence_parallel cannot be exact here", why=reason, hint="sequence_parallel: false")


def install_sequence_parallel(model: nn.Module, specs: Mapping[str, ParamSpec], group: ProcessGroup, wide: bool) -> None:
    """Install the collectives in a model with sharded parameters: tensor-parallel regions, embedding, output projection."""
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
    """Register hooks that sum the gradients of replicated parameters over the ranks, in fp32, as they are computed."""
    for name, param in parameters.items():
        if specs[name].cut == "replicated":
            param.register_hook(lambda grad: tp_sum(grad, group, wide=True))
