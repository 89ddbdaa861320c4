"""Norms of the residual stream, all computed in fp32 (fp64 for an fp64 model) and cast back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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

    def forward(self, x: Tensor) -> Tensor:
        """Normed x in x's dtype."""
        wide = x if x.dtype == torch.float64 else x.float()
        weight = None if self.weight is None else self.weight.to(wide.dtype)
        if "layernorm" in self.kind:
            bias = None if self.bias is None else self.bias.to(wide.dtype)
            return F.layer_norm(wide, (self.size,), weight, bias, self.eps).to(x.dtype)
        return F.rms_norm(wide, (self.size,), weight, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.kind}, {self.size}, eps={self.eps}"
