"""Accumulation dtype of sums, states and denominators (fp32; fp64 for fp64 inputs), and the effect of autocast.

Autocast changes nothing inside an operator of this folder: its dtypes are explicit, and a backward gives the same gradients
inside and outside of the autocast region. Autocast only changes the inputs: projections become bf16 or fp16, while vectors,
convolutions, rates and states stay in fp32. So operators accept inputs of mixed dtypes, and each gradient has the dtype of its
input. Two operators follow autocast as PyTorch's own do and cast their inputs: `packed_linear` (as `F.linear`) and `attention`
(as `scaled_dot_product_attention`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Target = TypeVar("Target", bound=Callable[..., Any])


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_accumulation_dtype(x: Tensor) -> Tensor:
    """`x` in the accumulation dtype; `x` itself if it already has it."""
    return x.to(sum_dtype(x.dtype))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of matrix products under autocast on `device`; None if autocast is off, and on the meta device."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def outside_autocast(target: Target) -> Target:
    """Decorator that turns autocast off inside a function, or inside forward and backward of an autograd.Function.

    A backward may be called inside the autocast region or after it. For an autograd.Function both are the same. The backward of
    a plain function is that of autograd: its matrix products follow autocast if `backward()` is called inside the region, like
    those of PyTorch's own operators.
    """
    if not isinstance(target, type):
        return _without(target)  # type: ignore[return-value]
    for half in ("forward", "backward"):
        setattr(target, half, staticmethod(_without(getattr(target, half))))
    return target


def _without(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` with autocast off on the device of its first tensor, which may be in a tuple of inputs."""

    @functools.wraps(run)
    def plain(*args: Any, **kwargs: Any) -> Any:
        parts = (part if isinstance(part, tuple) else (part,) for part in (*args, *kwargs.values()))
        device = next((x.device for part in parts for x in part if isinstance(x, Tensor)), None)
        if device is None or autocast_dtype(device) is None:
            return run(*args, **kwargs)
        with torch.autocast(device.type, enabled=False):
            return run(*args, **kwargs)

    plain.outside_autocast = True  # type: ignore[attr-defined]
    return plain
