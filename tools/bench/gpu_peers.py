"""What `metala_gpu.py` compares: the MetaLA operator as flash-linear-attention users write it, and ours, in one form.

A variant is a function of the packed projection [b, t, h (2k + 2v)] and w [h, k], so that all pay for cutting it, and answers
[b, t, h, v]. The peers compute the published formula in the model's dtype, as the released code does (gate, key, augmentation,
norm and output gate by torch around `chunk_gla`): in fp32 they would move twice the bytes.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.ops.metala import MetaLAInputs, cut_packed, metala_packed

Variant = Callable[[Tensor, Tensor], Tensor]


def fla_version() -> str | None:
    """Version of flash-linear-attention, None where it is not installed."""
    if importlib.util.find_spec("fla") is None:
        return None
    return str(getattr(importlib.import_module("fla"), "__version__", "unknown"))


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


def variants(device: str) -> dict[str, Variant]:
    """Name -> what to run; the peers where the package is there (on a CPU our plain path stands in for them)."""
    functions = {"ours": ours("triton")}
    if device == "cpu":
        return functions | {"torch": ours("torch")}
    if fla_version() is not None:
        functions |= {"fla + eager glue": by_fla(False), "fla + compiled glue": by_fla(True)}
    return functions


def fla_step() -> Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """One decode step by `fused_recurrent_gla` and eager glue: (packed [b, 1, ..], w, state) -> (y, new state)."""
    fused_recurrent_gla = importlib.import_module("fla.ops.gla").fused_recurrent_gla

    def run(packed: Tensor, w: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        q, z, v, g = cut_packed(packed, w)
        log_decay, key = gate_and_key(z)
        given = (x.contiguous() for x in (q, key, v))
        o, new = fused_recurrent_gla(*given, gk=log_decay.contiguous(), initial_state=state, output_final_state=True)
        return around(o, q, key, v, g, w), new

    return run


def use_fla_in_layers(compiled: bool) -> Callable[..., Any]:
    """What a whole model runs as its MetaLA path to be measured: a path of the operator."""
    chunk_gla = importlib.import_module("fla.ops.gla").chunk_gla
    front, back = glue(compiled)

    def run(x: MetaLAInputs) -> tuple[Tensor, Tensor | None]:
        log_decay, key = front(x.z)
        o, last = chunk_gla(*(part.contiguous() for part in (x.q, key, x.v, log_decay)))
        return back(o, x.q, key, x.v, x.g, x.w), last

    return run
