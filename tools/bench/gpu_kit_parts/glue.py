"""The MetaLA operator as users of flash-linear-attention write it, and ours, in one form for `peers.py`.

A variant is a function of the packed projection [b, t, h (2k + 2v)] and w [h, k], so that all pay for cutting it, and answers
[b, t, h, v]. The peers compute the published formula in the model's dtype, as the released code does (gate, key, augmentation,
norm and output gate by torch around `chunk_gla`): in fp32 they would move twice the bytes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.ops.metala import cut_packed, metala_packed

Variant = Callable[[Tensor, Tensor], Tensor]


def gate_and_key(z: Tensor) -> tuple[Tensor, Tensor]:
    """Log decay and key, as published."""
    log_decay = F.logsigmoid(z) / 16
    return log_decay, 1 - torch.exp(log_decay)


def around(o: Tensor, q: Tensor, key: Tensor, v: Tensor, g: Tensor, w: Tensor) -> Tensor:
    """The operations after the scan, as published."""
    o = o + torch.sigmoid((q * key * w).sum(-1, keepdim=True) * v)
    return F.layer_norm(o, o.shape[-1:], eps=1e-5) * F.silu(g)


def glue(compiled: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The operations before and after the scan; compiled per shape, as in a training run of one shape."""
    if not compiled:
        return gate_and_key, around
    torch._dynamo.config.recompile_limit = 64  # beyond its default of 8 shapes it would silently run eagerly
    return torch.compile(gate_and_key, dynamic=False), torch.compile(around, dynamic=False)


def by_fla(compiled: bool) -> Variant:
    """`chunk_gla` and the glue, eager or compiled (the kernels themselves stay outside of torch.compile, as they ask for)."""
    chunk_gla = importlib.import_module("fla.ops.gla").chunk_gla
    front, back = glue(compiled)

    def run(packed: Tensor, w: Tensor) -> Tensor:
        q, z, v, g = cut_packed(packed, w)
        log_decay, key = front(z)
        o, _ = chunk_gla(*(x.contiguous() for x in (q, key, v, log_decay)))
        return back(o, q, key, v, g, w)

    return run


def ours(backend: str) -> Variant:
    """Our operator on one of its paths."""

    def run(packed: Tensor, w: Tensor) -> Tensor:
        return metala_packed(packed, w, backend=backend)[0]

    return run
