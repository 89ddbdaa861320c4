"""Whether to skip a step: decided on the device from the global loss and gradient norm, before the weights change.

Both numbers are the same on every rank when the optimizer runs, so all ranks decide the same without a further collective. The
decision is a tensor that the fused optimizer kernel reads (`found_inf`): under DeepSpeed no rank waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepLimits:
    """The largest loss and gradient norm (before clipping) that a step may have; inf allows any finite value."""

    loss: float = math.inf
    grad_norm: float = math.inf


def should_skip(loss: Tensor, grad_norm: Tensor, limits: StepLimits) -> Tensor:
    """1.0 where the step must not be applied, else 0.0: a scalar in fp32 on the device of `loss`.

    A step is skipped if a number is not finite or above its limit, or if the norm is negative (-1 is DeepSpeed's inf or NaN).
    """
    norm = grad_norm.to(loss.device)
    fine = torch.isfinite(loss) & torch.isfinite(norm) & (norm >= 0) & (loss <= limits.loss) & (norm <= limits.grad_norm)
    return torch.logical_not(fine).float().reshape(())
