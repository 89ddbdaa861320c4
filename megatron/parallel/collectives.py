"""The two all-reduces of tensor parallelism as modules that stand in a layer's `split` and `join`.

A layer written for one device calls `self.copy_to_tp(x)` where work on separate heads begins and `self.reduce_from_tp(y)` where
the partial sums meet. `CopyToTP` is the identity forward and sums gradients backward; `ReduceFromTP` sums forward and is the
identity backward. Together they are all the communication of a block: two all-reduces forward, two backward.
Every tensor collective of this project goes through `all_reduce` here, so that a test can count them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron.ops.precision import outside_autocast


def all_reduce(x: Tensor, group: ProcessGroup | None, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """A new tensor: the reduction of `x` over `group`; `x` itself when there is no group.

    The input is copied first: a gradient or an activation may be in use elsewhere, and gloo and NCCL reduce in place.
    """
    if group is None:
        return x
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, op=op, group=group)
    return out


def tp_sum(x: Tensor, group: ProcessGroup, wide: bool) -> Tensor:
    """Sum over the group, formed in fp32 when `wide` and `x` is narrower; in x's dtype."""
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
    """Entry of a split region: the same `x` on every tensor-parallel rank; its gradient is the sum over ranks."""

    def __init__(self, group: ProcessGroup, wide: bool = False) -> None:
        super().__init__()
        self.group, self.wide = group, wide

    def forward(self, x: Tensor) -> Tensor:
        """`x` of any shape, unchanged."""
        return _Copy.apply(x, self.group, self.wide)


class ReduceFromTP(nn.Module):
    """Exit of a split region: the sum of the ranks' partial results, on every rank."""

    def __init__(self, group: ProcessGroup, wide: bool = False) -> None:
        super().__init__()
        self.group, self.wide = group, wide

    def forward(self, x: Tensor) -> Tensor:
        """Partial `x` of any shape -> its sum over the group, same shape."""
        return _Reduce.apply(x, self.group, self.wide)
