"""Hand-written autograd functions as single nodes of a compiled or exported graph.

Their loops over chunks, rows and tokens would be unrolled by `torch.compile` (minutes for a toy model), and what they decide by
a number, such as the length of a chunk, breaks its graph. While it traces, `opaque` calls a custom operator instead, which runs
the same forward; its gradient is a second one, which runs forward and backward in one. So a compiled training step computes the
operator's forward twice, keeping nothing but its inputs in between. Without a compiler the autograd function itself runs.

Custom operators are known to the whole process by their name. A second copy of the same text, such as an exported folder that
is loaded beside the trainer or beside another folder, finds the name taken and gets the next free one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

NAMESPACE = "linear_neox"
_KINDS = {"Tensor": "Tensor", "Tensor | None": "Tensor?", "float": "float", "int": "SymInt", "bool": "bool", "str": "str"}
_RESULTS = {"Tensor": "Tensor", "tuple[Tensor, Tensor]": "(Tensor, Tensor)"}


def values_visible(x: Tensor) -> bool:
    """Whether Python may look at the values of tensors like `x`: they exist, and no compiler is tracing."""
    return x.device.type != "meta" and not torch.compiler.is_compiling()


def has_numbers(x: Tensor) -> bool:
    """False for a tensor that stands for one of its shape while memory is counted (`planning/memory.py`).

    Turns of a loop that leave no other trace in memory than the turn before need not be run then: there may be thousands.
    """
    return not isinstance(x, FakeTensor)


def worked(start: int, chunk: int, s: int, x: Tensor) -> bool:
    """Whether the chunk at `start` of `s` tokens is worked on: all are, but where only memory is counted (`has_numbers`) the
    first and the last two are enough, the only ones that may differ from their neighbours.
    """
    return has_numbers(x) or start == 0 or start + 2 * chunk >= s


class _Kept:
    """Stands in for autograd's context where a Function's halves are called by hand."""

    def __init__(self, wanted: Sequence[bool]) -> None:
        self.needs_input_grad = tuple(wanted)
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Hold what the backward will read."""
        self.saved_tensors = tensors


def _free_name(name: str) -> str:
    """`name`, or with the first number behind it that no operator of the process has."""
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
    """`function.apply`, to the compiler a single operator.

    Args:
        name: of the custom operator.
        function: subclass of torch.autograd.Function whose `forward` is annotated (`Tensor`, `Tensor | None`, `float`, `int`,
            `bool`, `str` -> `Tensor` or a pair of them), and which has a third static method `like(*inputs)`: empty dense
            tensors of the shapes and formats of the results.
    """
    kinds = dict(function.forward.__annotations__)  # text, in the order of the parameters
    result = _RESULTS[kinds.pop("return")]
    arguments = ", ".join(f"{_KINDS[kind]} {argument}" for argument, kind in kinds.items() if argument != "ctx")
    own = _free_name(name)

    def forward(*given: Any) -> Any:
        found = _owned(_listed(function.forward(_Kept([False] * len(given)), *given)), given)
        return found[0] if result == "Tensor" else tuple(found)

    def gradient(upstream: list[Tensor], wanted: list[bool], *given: Any) -> list[Tensor]:
        kept = _Kept(wanted)
        function.forward(kept, *given)
        found = _listed(function.backward(kept, *upstream))
        asked = [(x, g) for x, g, want in zip(given, found, wanted, strict=True) if want]
        return _owned([torch.zeros_like(x) if g is None else g.to(x.dtype) for x, g in asked], [*given, *upstream])

    def gradient_like(upstream: list[Tensor], wanted: list[bool], *given: Any) -> list[Tensor]:
        return [x.new_empty(x.shape) for x, want in zip(given, wanted, strict=True) if want]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
        ctx.rest = [None if isinstance(x, Tensor) else (x,) for x in inputs]

    def backward(ctx: Any, *upstream: Tensor) -> Any:
        tensors = iter(ctx.saved_tensors)
        given = [next(tensors) if x is None else x[0] for x in ctx.rest]
        wanted = [bool(want) and isinstance(x, Tensor) for x, want in zip(given, ctx.needs_input_grad, strict=True)]
        found = iter(backward_op(list(upstream), wanted, *given) if any(wanted) else ())
        return tuple(next(found) if want else None for want in wanted)

    schema = f"(Tensor[] upstream, bool[] wanted, {arguments}) -> Tensor[]"
    backward_op = torch.library.custom_op(f"{NAMESPACE}::{own}_gradient", gradient, mutates_args=(), schema=schema)
    backward_op.register_fake(gradient_like)
    forward_op = torch.library.custom_op(f"{NAMESPACE}::{own}", forward, mutates_args=(), schema=f"({arguments}) -> {result}")
    forward_op.register_fake(function.like)
    forward_op.register_autograd(backward, setup_context=setup)

    def run(*given: Any) -> Any:
        return forward_op(*given) if torch.compiler.is_compiling() else function.apply(*given)

    return run
