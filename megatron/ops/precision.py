"""In which format sums, states and denominators are kept (fp32, fp64 where the input is fp64), and what autocast may change.

Nothing inside an operator of this folder: it computes in the formats that its own text says, whether autocast is on or not, and
a backward gives the same gradients inside and outside of the region. What autocast does change is what comes in: it makes the
projections bf16 or fp16 and leaves vectors, convolutions, rates and states in fp32. So operators take inputs of mixed formats,
and each gradient comes back in the format of its input. Two operators are to autocast what PyTorch's own are and take their
inputs in its format: `packed_linear` (as `F.linear`) and `attention` (as `scaled_dot_product_attention`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made", bound=Callable[..., Any])


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_accumulation_dtype(x: Tensor) -> Tensor:
    """`x` in the format of sums; itself where it is in it already."""
    return x.to(sum_dtype(x.dtype))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The format that autocast gives matrix products on `device`; None where it is off, and for tensors without memory."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def outside_autocast(made: Made) -> Made:
    """Decorator of a function, or of both halves of an autograd.Function: autocast is off inside.

    A backward may be called inside the region or after it. Of an autograd.Function it is the same both times; a plain
    function's belongs to autograd, and its matrix products follow autocast where `backward()` is called inside the region, as
    those of PyTorch's own operators do.
    """
    if not isinstance(made, type):
        return _without(made)  # type: ignore[return-value]
    for half in ("forward", "backward"):
        setattr(made, half, staticmethod(_without(getattr(made, half))))
    return made


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
