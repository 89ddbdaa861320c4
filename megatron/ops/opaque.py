"""Hand-written autograd functions as single nodes of a compiled or exported graph.

`torch.compile` would unroll their loops over chunks, rows and tokens (minutes for a toy model), and decisions that depend on
values, such as the chunk length, would break its graph. While it traces, `opaque` calls a custom operator instead, which runs
the same forward; its gradient is a second operator, which runs forward and backward. So a compiled training step computes the
operator's forward twice and saves only its inputs in between. Without a compiler the autograd function itself runs.

The names of custom operators are global to the process. A second copy of the same code, such as an exported folder that is
loaded next to the trainer or to another folder, gets the next free name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

NAMESPACE = "linear_neox"
T = TypeVar("T")
_KINDS = {"Tensor": "Tensor", "Tensor | None": "Tensor?", "float": "float", "int": "SymInt", "bool": "bool", "str": "str"}
_RESULTS = {"Tensor": "Tensor", "tuple[Tensor, Tensor]": "(Tensor, Tensor)"}


def values_visible(x: Tensor) -> bool:
    """Whether Python may look at the values of tensors like `x`: they exist, and no compiler is tracing."""
    return x.device.type != "meta" and not torch.compiler.is_compiling()


def has_numbers(x: Tensor) -> bool:
    """False for a fake tensor, which has a shape but no values, while memory is estimated (`planning/memory.py`).

    Loop iterations that allocate nothing new can then be skipped: there may be thousands.
    """
    return not isinstance(x, FakeTensor) or torch.compiler.is_compiling()


def visited(turns: Sequence[T], x: Tensor) -> Sequence[T]:
    """The iterations of a loop over equal blocks of a long tensor that are run: all of them, but in a memory estimate
    (`has_numbers`) the first two and the last two, which alone may differ from their neighbours.

    Args:
        turns: one item per iteration.
        x: what the loop reads.
    """
    return turns if has_numbers(x) or len(turns) < 5 else [*turns[:2], *turns[-2:]]


def unvisited_like(turns: Sequence[T], saved: Sequence[Tensor]) -> list[Tensor]:
    """The memory of what the iterations that `visited` omits would save, one allocation per tensor; empty if none is omitted.

    Args:
        turns: as for `visited`.
        saved: what one full iteration saves. A view of a larger tensor needs no memory of its own.
    """
    count = len(turns) - len(visited(turns, saved[0]))
    return [x.new_empty(count, *x.shape) for x in saved if count and x.untyped_storage().nbytes() == x.nbytes]


class _ManualContext:
    """Replaces autograd's context when forward and backward of a Function are called directly."""

    def __init__(self, needs_grad: Sequence[bool]) -> None:
        self.needs_input_grad = tuple(needs_grad)
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Store the tensors for the backward."""
        self.saved_tensors = tensors


def _free_name(name: str) -> str:
    """`name`, with the first free number as suffix if an operator of the process already has this name."""
    operators, free, number = getattr(torch.ops, NAMESPACE), name, 1
    while hasattr(operators, free):
        number += 1
        free = f"{name}_{number}"
    return free


def _owned(results: Sequence[Tensor], given: Sequence[Any]) -> list[Tensor]:
    """Dense tensors none of which is an input, as custom operators must return them."""
    return [x.clone(memory_format=torch.contiguous_format) if any(x is y for y in given) else x.contiguous() for x in results]


def _listed(results: Any) -> Sequence[Tensor]:
    return (results,) if isinstance(results, Tensor) else results


def opaque(name: str, function: Any) -> Callable[..., Any]:
    """`function.apply`, which the compiler sees as a single operator.

    Args:
        name: name of the custom operator.
        function: subclass of torch.autograd.Function whose `forward` is annotated (`Tensor`, `Tensor | None`, `float`, `int`,
            `bool`, `str` -> `Tensor` or a pair of them), and which has a third static method `like(*inputs)`: empty dense
            tensors with the shapes and dtypes of the results.
    """
    kinds = dict(function.forward.__annotations__)  # strings, in the order of the parameters
    result = _RESULTS[kinds.pop("return")]
    arguments = ", ".join(f"{_KINDS[kind]} {argument}" for argument, kind in kinds.items() if argument != "ctx")
    own = _free_name(name)

    def forward(*given: Any) -> Any:
        outputs = _owned(_listed(function.forward(_ManualContext([False] * len(given)), *given)), given)
        return outputs[0] if result == "Tensor" else tuple(outputs)

    def gradient(upstream: list[Tensor], needs_grad: list[bool], *given: Any) -> list[Tensor]:
        ctx = _ManualContext(needs_grad)
        function.forward(ctx, *given)
        gradients = _listed(function.backward(ctx, *upstream))
        pairs = [(x, g) for x, g, needed in zip(given, gradients, needs_grad, strict=True) if needed]
        return _owned([torch.zeros_like(x) if g is None else g.to(x.dtype) for x, g in pairs], [*given, *upstream])

    def gradient_like(upstream: list[Tensor], needs_grad: list[bool], *given: Any) -> list[Tensor]:
        return [x.new_empty(x.shape) for x, needed in zip(given, needs_grad, strict=True) if needed]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
        ctx.rest = [None if isinstance(x, Tensor) else (x,) for x in inputs]

    def backward(ctx: Any, *upstream: Tensor) -> Any:
        tensors = iter(ctx.saved_tensors)
        given = [next(tensors) if x is None else x[0] for x in ctx.rest]
        needs_grad = [bool(needed) and isinstance(x, Tensor) for x, needed in zip(given, ctx.needs_input_grad, strict=True)]
        gradients = iter(backward_op(list(upstream), needs_grad, *given) if any(needs_grad) else ())
        return tuple(next(gradients) if needed else None for needed in needs_grad)

    schema = f"(Tensor[] upstream, bool[] needs_grad, {arguments}) -> Tensor[]"
    backward_op = torch.library.custom_op(f"{NAMESPACE}::{own}_gradient", gradient, mutates_args=(), schema=schema)
    backward_op.register_fake(gradient_like)
    forward_op = torch.library.custom_op(f"{NAMESPACE}::{own}", forward, mutates_args=(), schema=f"({arguments}) -> {result}")
    forward_op.register_fake(function.like)
    forward_op.register_autograd(backward, setup_context=setup)

    def run(*given: Any) -> Any:
        return forward_op(*given) if torch.compiler.is_compiling() else function.apply(*given)

    return run
