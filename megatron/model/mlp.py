"""The channel half of a block: a gated (LLaMA) or a plain MLP, sharded over tensor-parallel ranks by its hidden width."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.ops.dispatch import chosen
from megatron.ops.gated import GATES, gated, gated_packed
from megatron.ops.modules import are_plain, row_linear
from megatron.ops.packed_linear import are_adjacent, pack_weights, packed_linear
from megatron.ops.precision import autocast_dtype

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "elu": F.elu,
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "leak": F.leaky_relu,
    "1+elu": lambda x: 1 + F.elu(x),
    "2+elu": lambda x: 2 + F.elu(x),
    "sine": torch.sin,
    "softsign": F.softsign,
    "mish": F.mish,
    "identity": lambda x: x,
}


class MLP(nn.Module):
    """gated: l3(act(l1 x) * l2 x); plain: l3(act(l1 x)). Names l1, l2, l3 are those of the released MetaLA models."""

    def __init__(self, kind: str, size: int, width: int, activation: str, bias: bool) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
        self.activation, self.act = activation, ACTIVATIONS[activation]
        self.l1 = nn.Linear(size, width, bias=bias)
        self.l2 = nn.Linear(size, width, bias=bias) if kind == "gated" else None
        self.l3 = nn.Linear(width, size, bias=bias)
        self.copy_to_tp: nn.Module = nn.Identity()
        self.reduce_from_tp: nn.Module = nn.Identity()

    def pack_weights(self) -> None:
        """Make l1 and l2 adjacent in memory: they are then one matrix product, and their gradient is one tensor."""
        if self.l2 is not None and not self._has_bias():
            pack_weights([self.l1.weight, self.l2.weight])

    def _has_bias(self) -> bool:
        return any(getattr(linear, "bias", None) is not None for linear in (self.l1, self.l2))

    def _is_packed(self, x: Tensor, backend: str) -> bool:
        """Whether l1 and l2 are one product: plain matrices, adjacent in memory, and not on the reference path.

        Under autocast, which caches a cast copy of each weight, and in a compiled graph, which has no addresses, they are two.
        """
        return (
            self.l2 is not None
            and not self._has_bias()
            and not torch.compiler.is_compiling()
            and autocast_dtype(x.device) is None
            and are_plain(self.l1, self.l2)
            and are_adjacent([self.l1.weight, self.l2.weight])
            and chosen("gated", backend, x.device) != "reference"
        )

    def _inner(self, x: Tensor, backend: str) -> Tensor:
        """`x [b, s, d]` -> the input of l3 [b, s, width]."""
        if self.l2 is None:
            return self.act(self.l1(x))
        if self.activation not in GATES:
            return self.act(self.l1(x)) * self.l2(x)
        if self._is_packed(x, backend):
            packed = packed_linear(x, [self.l1.weight, self.l2.weight], None, backend)
            return gated_packed(packed, self.activation, backend)
        return gated(self.l1(x), self.l2(x), self.activation, backend)

    def forward(self, x: Tensor, backend: str = "auto") -> Tensor:
        """`x [b, s, d]` -> `[b, s, d]`; the output bias is added once, after the all-reduce of the partial sums."""
        x = self.copy_to_tp(x)
        return row_linear(self.l3, self._inner(x, backend), self.reduce_from_tp)

    def plan(self) -> dict[str, str]:
        """The hidden width is sharded; see `parallel/shard_spec.py`."""
        kinds = {"l1.weight": "column", "l2.weight": "column", "l3.weight": "row"}
        kinds |= {"l1.bias": "column", "l2.bias": "column", "l3.bias": "replicated"}
        return {name: kinds[name] for name, _ in self.named_parameters()}

    def init_rules(self) -> dict[str, str]:
        """Initialiser roles; see `model/init.py`."""
        roles = {"l1.weight": "input", "l2.weight": "input", "l3.weight": "output"}
        return {name: roles.get(name, "zeros") for name, _ in self.named_parameters()}
