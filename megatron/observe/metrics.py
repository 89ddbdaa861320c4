"""Throughput, FLOP rate, utilisation, memory and time remaining, from the steps of a log interval.

FLOPs are those of the actual model (`train_flops_per_token`, forward and backward), not GPT-NeoX's formula for softmax
transformers: a linear layer must not appear faster by being counted as a quadratic one.
"""

from __future__ import annotations

import math
import resource
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CostModel:
    """The cost of a token and the peak rate of the hardware.

    Attributes:
        train_flops_per_token: forward and backward FLOPs of the complete model.
        world_size: number of processes (one GPU each).
        peak_tflops: `peak_theoretical_tflops` of one GPU; None (unknown): utilisation is not reported.
        recompute: activations are recomputed, so the hardware executes one additional forward pass (factor 4/3).
    """

    train_flops_per_token: float
    world_size: int = 1
    peak_tflops: float | None = None
    recompute: bool = False


@dataclass
class Interval:
    """Sums over the steps since the last report."""

    steps: int = 0
    seconds: float = 0.0
    wait_s: float = 0.0
    tokens: int = 0
    samples: int = 0
    loss_sum: float = 0.0
    counted: int = 0
    skipped: int = 0
    nan: int = 0

    def add(self, *, seconds: float, wait_s: float, tokens: int, samples: int, loss: float, skipped: bool) -> None:
        """Add a step; the mean loss excludes skipped steps and non-finite losses."""
        self.steps += 1
        self.seconds += seconds
        self.wait_s += wait_s
        self.tokens += tokens
        self.samples += samples
        self.skipped += int(skipped)
        finite = math.isfinite(loss)
        self.nan += int(not finite)
        if finite and not skipped:
            self.loss_sum += loss
            self.counted += 1

    @property
    def mean_loss(self) -> float | None:
        """Mean loss of the counted steps, None if there are none."""
        return self.loss_sum / self.counted if self.counted else None

    def metrics(self, cost: CostModel) -> dict[str, float]:
        """Means over the interval under NeoX's `runtime/` names; times in seconds, FLOPs per second per GPU."""
        seconds = max(self.seconds, 1e-9)
        flops = self.tokens * cost.train_flops_per_token / seconds / cost.world_size
        values = {
            "runtime/samples_per_sec": self.samples / seconds,
            "runtime/iteration_time": seconds / self.steps,
            "runtime/steps_per_sec": self.steps / seconds,
            "runtime/tokens_per_sec": self.tokens / seconds,
            "runtime/flops_per_sec_per_gpu": flops,
            "runtime/data_wait": self.wait_s / self.steps,
            "runtime/max_memory_gib": max_memory_gib(),
        }
        if cost.peak_tflops:
            values["runtime/model_flops_utilization"] = flops / (cost.peak_tflops * 1e12)
            factor = 4 / 3 if cost.recompute else 1.0
            values["runtime/hardware_flops_utilization"] = factor * flops / (cost.peak_tflops * 1e12)
        return values


def max_memory_gib() -> float:
    """Peak memory of this process in GiB: of its GPU if it uses one, else resident host memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Remaining:
    """Estimates the time remaining from a moving average of step times, which soon forgets a slow first step."""

    def __init__(self, weight: float = 0.3) -> None:
        self._weight = weight
        self._mean: float | None = None

    def update(self, seconds_per_step: float) -> None:
        """Add the mean step time of an interval."""
        if self._mean is None:
            self._mean = seconds_per_step
        else:
            self._mean += self._weight * (seconds_per_step - self._mean)

    def seconds(self, steps_left: int) -> float:
        """Seconds that `steps_left` steps will take; 0 before the first interval."""
        return (self._mean or 0.0) * steps_left
