"""Throughput, FLOP rate, utilisation, memory and time remaining, from the steps of a log interval.

FLOPs are those of the actual model (`train_flops_per_token`, forward and backward), not GPT-NeoX's formula for softmax
transformers: a linear layer must not appear faster by being counted as a quadratic one.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Metric(NamedTuple):
    """What a key of `metrics.jsonl` holds.

    Attributes:
        unit: of the value; empty for a count or a ratio.
        meaning: one sentence, with the condition under which the key is present.
    """

    unit: str
    meaning: str


# Every key of `metrics.jsonl`, TensorBoard and W&B. tests/observe/test_metric_names.py fails for a key without an entry.
METRICS: Mapping[str, Metric] = {
    "iteration": Metric("", "The optimizer step, from 1; skipped steps count. Row 0 is a validation before the first step."),
    "train/lm_loss": Metric(
        "nats per token", "Loss of this step itself over the global batch, not rounded; `null` if it is not finite."
    ),
    "train/lm_loss_mean": Metric(
        "nats per token",
        "Mean of the losses since the previous row, without skipped steps and non-finite losses; absent if none is left.",
    ),
    "train/ntp_loss": Metric("nats per token", "With JRT's objective: the loss of the tokens after the prefix (next token)."),
    "train/mlm_loss": Metric(
        "nats per token", "With JRT's objective: the loss of the masked tokens of the prefix, not weighted."
    ),
    "train/learning_rate": Metric("", "Learning rate of this step."),
    "train/grad_norm": Metric("", "L2 norm of all gradients before clipping; `null` if it is not finite."),
    "train/loss_scale": Metric("", "With fp16 and a dynamic loss scale: the factor of the loss, for the next step."),
    "train/tokens": Metric("tokens", "Tokens read since the start of training, resumed runs included."),
    "train/samples": Metric("samples", "Samples read since the start of training; the data cursor of a resume."),
    "train/skipped_iterations": Metric(
        "steps",
        "Steps since the start of training that left weights, optimizer state and schedule as they were: a loss or gradient "
        "norm that was not finite, a spike (`spike_sigma`), an overflow of fp16, and steps that a rewind took back.",
    ),
    "wall_time": Metric("s", "Unix time at which the row was written."),
    "runtime/samples_per_sec": Metric("samples/s", "Samples of all ranks per second, since the previous row."),
    "runtime/iteration_time": Metric("s", "Mean time of a step since the previous row; saves and evaluations are not in it."),
    "runtime/steps_per_sec": Metric(
        "steps/s", "Steps per second since the previous row, the inverse of `runtime/iteration_time`."
    ),
    "runtime/tokens_per_sec": Metric("tokens/s", "Tokens of all ranks per second, since the previous row."),
    "runtime/flops_per_sec_per_gpu": Metric(
        "FLOP/s", "Rate of one rank from the forward and backward FLOPs of the actual model, recomputation not counted."
    ),
    "runtime/data_wait": Metric("s", "Mean time per step in which rank 0 waited for batches, since the previous row."),
    "runtime/max_memory_gib": Metric(
        "GiB", "Peak memory of rank 0: allocated by PyTorch on its GPU, without one resident on the host."
    ),
    "runtime/model_flops_utilization": Metric(
        "", "MFU: `runtime/flops_per_sec_per_gpu` over `peak_theoretical_tflops`; present if that key is set."
    ),
    "runtime/hardware_flops_utilization": Metric(
        "", "HFU: as MFU, times 4/3 if activations are recomputed; present if `peak_theoretical_tflops` is set."
    ),
    "runtime/save_time": Metric("s", "Time that checkpoints blocked training since the previous row; absent without a save."),
    "validation/lm_loss": Metric(
        "nats per token", "Loss on `eval_iters` batches of the validation split, every `eval_interval` steps."
    ),
    "validation/lm_loss_ppl": Metric("", "Perplexity, exp of `validation/lm_loss`."),
    "validation/accuracy": Metric("", "Share of right answers; present for synthetic tasks."),
    "test/lm_loss": Metric("nats per token", "Loss on the test split, once at the end of training."),
    "test/lm_loss_ppl": Metric("", "Perplexity, exp of `test/lm_loss`."),
    "test/accuracy": Metric("", "Share of right answers; present for synthetic tasks."),
}


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
