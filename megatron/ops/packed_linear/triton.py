"""`packed_linear` for the fused kernels: one product forward, two backward, and no copy of adjacent weights.

A custom operator, because `torch.compile` cannot trace the location of weights in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.ops.dispatch import path
from megatron.ops.packed_linear.operator import joined_rows, packed_bias
from megatron.ops.precision import outside_autocast


@torch.library.custom_op("linear_neox::packed_linear", mutates_args=())
def packed_linear_forward(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """x [..., d], weights [n_i, d], bias [n_last] -> [..., sum n_i]."""
    joined = joined_rows(weights)
    return torch.nn.functional.linear(x, joined, packed_bias(bias, joined.shape[0]))


@packed_linear_forward.register_fake
def _(x: Any, weights: Any, bias: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(w.shape[0] for w in weights))


@torch.library.custom_op("linear_neox::packed_linear_input_gradient", mutates_args=())
def packed_linear_input_gradient(dy: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """dy [..., sum n_i] -> dx [..., d]."""
    return dy @ joined_rows(weights)


@packed_linear_input_gradient.register_fake
def _(dy: Any, weights: Any) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], weights[0].shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weights, bias = inputs
    ctx.bias = None if bias is None else bias.shape[0]
    ctx.save_for_backward(x, *weights)


@outside_autocast
def _gradient(ctx: Any, dy: Tensor) -> Any:
    x, *weights = ctx.saved_tensors
    dx = packed_linear_input_gradient(dy, weights) if ctx.needs_input_grad[0] else None
    flat = dy.flatten(0, -2)
    dweights = (flat.t() @ x.flatten(0, -2)).split([w.shape[0] for w in weights])
    dbias = None if ctx.bias is None else flat[:, flat.shape[1] - ctx.bias :].sum(0)
    return dx, list(dweights), dbias


packed_linear_forward.register_autograd(_gradient, setup_context=_setup)


@path("packed_linear", "triton")
def packed_linear_fused(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """The fused path; arguments and result as `packed_linear` in `ops/packed_linear/`."""
    return packed_linear_forward(x, list(weights), bias)
