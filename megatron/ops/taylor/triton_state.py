"""The state of a text alone, as one walk: what the prefix of a JRT model adds to the causal scan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.ops.precision import outside_autocast
from megatron.ops.taylor import triton_launch as launch
from megatron.ops.taylor.features import feature_count


@torch.library.custom_op("linear_neox::taylor_state", mutates_args=())
def taylor_state(k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    """Sum of phi(k)^T [v | 1] weight over k [b, t, h, f], v [b, t, h, v] and weight [b, t]: [b, h, e, v + 1] in fp32."""
    return launch.end_state(launch.Inputs.of(k, k, v, weight, None, None))


@taylor_state.register_fake
def _(k: Any, v: Any, weight: Any) -> Tensor:
    b, _, h, f = k.shape
    return k.new_empty(b, h, feature_count(f), v.shape[-1] + 1, dtype=torch.float32)


@torch.library.custom_op("linear_neox::taylor_state_backward", mutates_args=())
def taylor_state_backward(dstate: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of k and v, dense and in their dtypes."""
    return launch.end_state_backward(launch.Inputs.of(k, k, v, weight, None, None), dstate)


@taylor_state_backward.register_fake
def _(dstate: Any, k: Any, v: Any, weight: Any) -> tuple[Tensor, Tensor]:
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    return dk, dv


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


@outside_autocast
def _gradient(ctx: Any, dstate: Tensor) -> Any:
    return *taylor_state_backward(dstate, *ctx.saved_tensors), None


taylor_state.register_autograd(_gradient, setup_context=_setup)
