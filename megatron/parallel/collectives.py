"""The two all-reduces of tensor parallelism, as the modules `copy_to_tp` and `reduce_from_tp` of a layer.

A layer written for one device calls `self.copy_to_tp(x)` where work on separate heads begins and `self.reduce_from_tp(y)` to
sum the partial results. `CopyToTP` is the identity forward and sums gradients backward (Megatron's f); `ReduceFromTP` sums
forward and is the identity backward (Megatron's g). They are the only communication of a block: two all-reduces forward and
two backward. Every tensor-parallel all-reduce goes through `all_reduce` here, so that a test can count them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron.ops.precision import outside_autocast


def all_reduce(x: Tensor, group: ProcessGroup | None, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduce `x` over `group` into a new tensor; without a group `x` itself.

    The input is copied first: a gradient or an activation may be in use elsewhere, and gloo and NCCL reduce in place.
    """
    if group is None:
        return x
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, op=op, group=group)
    return out


def tp_sum(x: Tensor, group: ProcessGroup, wide: bool) -> Tensor:
    """Sum over the group, in x's dtype; accumulated in fp32 if `wide` is set and `x` is narrower."""
    return all_reduce(x.float(), group).to(x.dtype) if wide and x.element_size() < 4 else all_reduce(x, group)


@outside_autocast
class _Copy(torch.autograd.Function):
    """Identity forward, sum of gradients backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, wide: bool) -> Tensor:
        ctx.group, ctx.wide = group, wide
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return tp_sum(grads[0], ctx.group, ctx.wide), None, None


@outside_autocast
class _Reduce(torch.autograd.Function):
    """Sum forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, wide: bool) -> Tensor:
        return tp_sum(x, group, wide)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


class CopyToTP(nn.Module):
    """Entry of a tensor-parallel region: the same `x` on every rank; its gradient is summed over ranks."""

    def __init__(self, group: ProcessGroup, wide: bool = False) -> None:
        super().__init__()
        self.group, self.wide = group, wide

    def forward(self, x: Tensor) -> Tensor:
        """`x` of any shape, unchanged."""
        return _Copy.apply(x, self.group, self.wide)


class ReduceFromTP(nn.Module):
    """Exit of a tensor-parallel region: the sum of the ranks' partial results, on every rank."""

    def __init__(self, group: ProcessGroup, wide: bool = False) -> None:
        super().__init__()
        self.group, self.wide = group, wide

    def forward(self, x: Tensor) -> Tensor:
        """Partial `x` of any shape -> its sum over the group, same shape."""
        return _Reduce.apply(x, self.group, self.wide)
