"""The channel half of a block: a gated (LLaMA) or a plain MLP, split over tensor-parallel ranks by its hidden width."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.ops.modules import row_linear

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
        self.act = ACTIVATIONS[activation]
        self.l1 = nn.Linear(size, width, bias=bias)
        self.l2 = nn.Linear(size, width, bias=bias) if kind == "gated" else None
        self.l3 = nn.Linear(width, size, bias=bias)
        self.copy_to_tp: nn.Module = nn.Identity()
        self.reduce_from_tp: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`x [b, s, d]` -> `[b, s, d]`; the output bias is added once, after the partial sums have met."""
        x = self.copy_to_tp(x)
        inner = self.act(self.l1(x))
        if self.l2 is not None:
            inner = inner * self.l2(x)
        return row_linear(self.l3, inner, self.reduce_from_tp)

    def plan(self) -> dict[str, str]:
        """Hidden width is split; see `parallel/shard_spec.py`."""
        cuts = {"l1.weight": "column", "l2.weight": "column", "l3.weight": "row"}
        cuts |= {"l1.bias": "column", "l2.bias": "column", "l3.bias": "replicated"}
        return {name: cuts[name] for name, _ in self.named_parameters()}

    def init_rules(self) -> dict[str, str]:
        """Initialiser roles; see `model/init.py`."""
        roles = {"l1.weight": "input", "l2.weight": "input", "l3.weight": "output"}
        return {name: roles.get(name, "zeros") for name, _ in self.named_parameters()}
