"""Console output: a header line that describes the run, then one progress line per log interval.

The progress line has GPT-NeoX's fields in GPT-NeoX's order, since scripts parse it, followed by ours:

    samples/sec: 3.250 | iteration       20/     100 | elapsed time per iteration (ms): 307.7 | learning rate:
    6.000E-04 |
    approx flops per GPU: 1.2TFLOPS | MFU: 12.3% | lm_loss: 4.123456E+00 | number of skipped iterations:   0 |
    number of nan iterations:   0 | grad norm: 0.873 | tokens/s: 1664 | data wait (ms): 0.2 | progress: 20.0% | ETA:
        0:00:25 |
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TextIO

# Label -> meaning, in the order of the progress line; tests/observe/test_metric_names.py compares them with it.
FIELDS: Mapping[str, str] = {
    "samples/sec": "Samples of all ranks per second since the previous line.",
    "iteration": "This step and `train_iters`.",
    "elapsed time per iteration (ms)": "Mean time of a step since the previous line, in milliseconds.",
    "learning rate": "Of this step.",
    "approx flops per GPU": "FLOP/s of one rank: forward and backward FLOPs of the actual model, recomputation not counted.",
    "MFU": "These FLOP/s over `peak_theoretical_tflops`; absent if that key is not set.",
    "lm_loss": "Mean loss since the previous line, in nats per token, without skipped and non-finite steps.",
    "loss scale": "With fp16 and a dynamic loss scale.",
    "number of skipped iterations": (
        "Steps since the previous line that left weights and optimizer state as they were; a line `step N skipped: ...` has "
        "the reason and samples of each. `train/skipped_iterations` of metrics.jsonl counts them all."
    ),
    "number of nan iterations": "Steps since the previous line whose loss was NaN or infinite.",
    "grad norm": "L2 norm of the gradients of this step before clipping.",
    "tokens/s": "Tokens of all ranks per second since the previous line.",
    "data wait (ms)": "Mean time per step in which rank 0 waited for batches, in milliseconds.",
    "progress": "Share of `train_iters`.",
    "ETA": "Estimated time to the last step, from a moving average of step times.",
}


def human(value: float, unit: str = "") -> str:
    """`1.23M`, `380.1M`, `2.7B`: three or four digits and a power of a thousand."""
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= limit:
            return f"{value / limit:.4g}{letter}{unit}"
    return f"{value:.4g}{unit}"


def human_flops(flops_per_s: float) -> str:
    """A floating-point rate in NeoX's format: `12.3TFLOPS`."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if flops_per_s >= factor:
            return f"{flops_per_s / factor:.1f}{prefix}FLOPS"
    return f"{flops_per_s:.1f}FLOPS"


def human_time(seconds: float) -> str:
    """`1:02:03`, with days if there are any: `2d 1:02:03`."""
    days, seconds_of_day = divmod(round(seconds), 86400)
    clock = f"{seconds_of_day // 3600}:{seconds_of_day // 60 % 60:02d}:{seconds_of_day % 60:02d}"
    return f"{days}d {clock}" if days else clock


@dataclass(frozen=True)
class RunHeader:
    """The content of the header line.

    Attributes:
        model: mixers and shape of the model.
        parameters: number of parameters.
        non_embedding: number of parameters without embeddings.
        tokens: tokens of the complete training.
        train_iters: optimizer steps of the training.
        mesh: description of the mesh.
        run_folder: path of the run folder.
        resumed_from: step of the checkpoint, 0 for a new run.
    """

    model: str
    parameters: int
    non_embedding: int
    tokens: int
    train_iters: int
    mesh: str
    run_folder: str
    resumed_from: int = 0

    def line(self) -> str:
        """`model metala 24 x 1024 | 380M parameters (...) | 15B tokens in 28610 steps | ... | run folder runs/x`."""
        fields = [
            f"model {self.model}",
            f"{human(self.parameters)} parameters ({human(self.non_embedding)} without embeddings)",
            f"{human(self.tokens)} tokens in {self.train_iters} iterations",
            self.mesh,
            f"run folder {self.run_folder}",
        ]
        if self.resumed_from:
            fields.append(f"resumed from iteration {self.resumed_from}")
        return " | ".join(fields)


def progress_line(
    iteration: int, total: int, values: Mapping[str, float], *, mean_loss: float | None, skipped: int, nan: int, eta_s: float
) -> str:
    """One progress line.

    Args:
        iteration: current step.
        total: steps of the training.
        values: metrics of the step under their full names; absent ones are omitted.
        mean_loss: mean loss since the last line, None if no step counts.
        skipped: skipped steps since the last line.
        nan: steps with a non-finite loss since the last line.
        eta_s: estimated time remaining, in seconds.
    """
    fields = [
        f"samples/sec: {values['runtime/samples_per_sec']:.3f}",
        f"iteration {iteration:8d}/{total:8d}",
        f"elapsed time per iteration (ms): {values['runtime/iteration_time'] * 1000:.1f}",
        f"learning rate: {values['train/learning_rate']:.3E}",
        f"approx flops per GPU: {human_flops(values['runtime/flops_per_sec_per_gpu'])}",
    ]
    if "runtime/model_flops_utilization" in values:
        fields.append(f"MFU: {values['runtime/model_flops_utilization']:.1%}")
    if mean_loss is not None:
        fields.append(f"lm_loss: {mean_loss:.6E}")
    if "train/loss_scale" in values:
        fields.append(f"loss scale: {values['train/loss_scale']:.1f}")
    fields += [
        f"number of skipped iterations: {skipped:3d}",
        f"number of nan iterations: {nan:3d}",
        f"grad norm: {values['train/grad_norm']:.3f}",
        f"tokens/s: {values['runtime/tokens_per_sec']:.0f}",
        f"data wait (ms): {values['runtime/data_wait'] * 1000:.1f}",
        f"progress: {iteration / total:.1%}",
        f"ETA: {human_time(eta_s)}",
    ]
    return " " + " | ".join(fields) + " |"


class Console:
    """Prints lines with a timestamp, flushed."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def say(self, text: str) -> None:
        """Print one message; ignores a closed or broken stream, since a lost line must not stop training."""
        try:
            print(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {text}", file=self._stream or sys.stdout, flush=True)
        except (OSError, ValueError):
            return
