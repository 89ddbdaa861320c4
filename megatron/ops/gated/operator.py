"""The product of a gated MLP, y = act(a) * b: plain forms and dispatch.

Autograd saves a and b only; the backward recomputes the activation, which costs less than the memory of its result. a and b
may be the two halves of a packed projection (`ops/packed_linear/`), whose gradient is then a single tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops.dispatch import choose, path
from megatron.ops.precision import outside_autocast

GATES: Mapping[str, str] = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_tanh": "gelu_tanh"}
"""Name of an activation -> its name in the operator; other activations are not supported."""


def _act(a: Tensor, form: str) -> Tensor:
    """The activation in a's dtype."""
    if form == "silu":
        return F.silu(a)
    return F.gelu(a, approximate="tanh" if form == "gelu_tanh" else "none")


def _act_gradient(up: Tensor, a: Tensor, form: str) -> Tensor:
    """Gradient of a, for the gradient `up` of act(a); it can be differentiated once more."""
    if form == "silu":
        if torch.is_grad_enabled():  # PyTorch's own operator has no derivative
            share = torch.sigmoid(a)
            return up * share * (1 + a * (1 - share))
        return torch.ops.aten.silu_backward(up, a)
    return torch.ops.aten.gelu_backward(up, a, approximate="tanh" if form == "gelu_tanh" else "none")


@outside_autocast
class _Gated(torch.autograd.Function):
    """a, b [..., d] -> [..., d]."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, form: str) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.form = form
        return _act(a, form).mul_(b)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        a, b = ctx.saved_tensors
        da = _act_gradient(dy * b, a, ctx.form) if ctx.needs_input_grad[0] else None
        db = dy * _act(a, ctx.form) if ctx.needs_input_grad[1] else None
        return da, db, None


@outside_autocast
class _GatedPacked(torch.autograd.Function):
    """a and b concatenated [..., 2 d] -> [..., d]."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, form: str) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.form = form
        a, b = packed.chunk(2, -1)
        return _act(a, form).mul_(b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        (packed,) = ctx.saved_tensors
        gradient = torch.empty_like(packed)
        (a, b), (da, db) = packed.chunk(2, -1), gradient.chunk(2, -1)
        torch.mul(dy, _act(a, ctx.form), out=db)
        da.copy_(_act_gradient(dy * b, a, ctx.form))
        return gradient, None


@path("gated", "reference")
def gated_reference(a: Tensor, b: Tensor | None, form: str) -> Tensor:
    """The formula, differentiated by autograd; without b, a contains both halves."""
    if b is None:
        a, b = a.chunk(2, -1)
    return _act(a, form) * b


@path("gated", "torch")
def gated_torch(a: Tensor, b: Tensor | None, form: str) -> Tensor:
    """The plain form; a compiler fuses the formula and decides itself what to save."""
    if torch.compiler.is_compiling() or (b is not None and a.dtype != b.dtype):
        return gated_reference(a, b, form)
    return _GatedPacked.apply(a, form) if b is None else _Gated.apply(a, b, form)


def gated(a: Tensor, b: Tensor, activation: str, backend: str = "auto") -> Tensor:
    """act(a) * b.

    Args:
        a: [..., d].
        b: [..., d].
        activation: a key of `GATES`.
        backend: path of the operator.
    """
    return choose("gated", backend, a.device)(a, b, GATES[activation])


def gated_packed(packed: Tensor, activation: str, backend: str = "auto") -> Tensor:
    """As `gated`, of a and b in one tensor.

    Args:
        packed: [..., 2 d], a first.
        activation: a key of `GATES`.
        backend: path of the operator.
    """
    return choose("gated", backend, packed.device)(packed, None, GATES[activation])
