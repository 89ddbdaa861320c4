"""Norms of the residual stream, all computed in fp32 (fp64 for an fp64 model) and cast back; `ops/norm/` computes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron.ops.norm import add_norm, norm


class Norm(nn.Module):
    """One of five norms over the last dimension, `x [..., d]`.

    layernorm (weight, bias) | layernorm_no_bias (weight) | rmsnorm (weight) | simplermsnorm (no parameter; the released MetaLA
    models) | non_parametric_layernorm.
    """

    def __init__(self, kind: str, size: int, eps: float) -> None:
        super().__init__()
        if kind not in ("layernorm", "layernorm_no_bias", "rmsnorm", "simplermsnorm", "non_parametric_layernorm"):
            raise ValueError(f"unknown norm {kind!r}")
        self.kind, self.size, self.eps = kind, size, eps
        gain = kind in ("layernorm", "layernorm_no_bias", "rmsnorm")
        self.weight = nn.Parameter(torch.ones(size)) if gain else None
        self.bias = nn.Parameter(torch.zeros(size)) if kind == "layernorm" else None

    def forward(self, x: Tensor, dtype: torch.dtype | None = None, backend: str = "auto", added: Tensor | None = None) -> Any:
        """Normed x [..., d] in `dtype` (x's by default); with `added`, (x + added in x's dtype, its norm)."""
        centred = "layernorm" in self.kind
        if added is None:
            return norm(x, self.weight, self.bias, centred=centred, eps=self.eps, dtype=dtype, backend=backend)
        return add_norm(x, added, self.weight, self.bias, centred=centred, eps=self.eps, dtype=dtype, backend=backend)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.kind}, {self.size}, eps={self.eps}"
