"""The hook that turns steps into metrics and lines. Rank 0 has one; the other ranks have none.

`train/lm_loss` in the metrics is the loss of the logged step itself, unrounded, so that two runs can be compared to
the bit; the console shows the mean over the interval, as GPT-NeoX does.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.observe.console import Console, progress_line
from megatron.observe.metrics import CostModel, Interval, Remaining
from megatron.observe.sinks import Sinks
from megatron.training.evaluate import Evaluation
from megatron.training.hooks import Hook, Run, Skip, Step
from megatron.training.intervals import every

# Other lines of the console -> meaning; words in capitals stand for a value.
LINES: Mapping[str, str] = {
    "step N skipped: REASON; samples of IDS": (
        "All ranks left weights and optimizer state as they were, for this reason; the samples of each data-parallel rank. "
        "Training continues with the next samples."
    ),
    "rewound to the weights of step N; data continues after step M": (
        "The budget of skipped steps was exhausted with `on_skip_budget: rewind`; the steps in between count as skipped."
    ),
    "saved PATH in X s": "A checkpoint was published; the time blocked training (with `async_save` the time of the copy).",
    "SPLIT at iteration N | lm_loss: X | lm_loss_ppl: X | accuracy: X | X s (best so far)": (
        "A validation, or the final test: loss in nats per token, perplexity, accuracy of synthetic tasks, duration."
    ),
    "OUTCOME at iteration N of M": "The end: `finished`, `stopped: REASON` or `failed: ERROR`.",
}


class Reporting(Hook):
    """Logs every `log_interval` steps to the sinks and the console; they are closed at the end of the run."""

    def __init__(self, sinks: Sinks, console: Console, cost: CostModel, log_interval: int = 100) -> None:
        self.sinks, self.console, self.cost, self.log_interval = sinks, console, cost, log_interval
        self._interval, self._remaining = Interval(), Remaining()
        self._last_step: Step | None = None
        self._save_s = 0.0

    def on_step(self, run: Run, step: Step) -> None:
        """Count the step, and report when the interval is full or training ends."""
        samples, self._last_step = run.options.samples_per_step, step
        self._interval.add(
            seconds=step.seconds,
            wait_s=step.data_wait_s,
            tokens=samples * run.options.seq_length,
            samples=samples,
            loss=step.loss,
            skipped=step.skipped,
        )
        if every(self.log_interval, step.iteration) or step.iteration == run.options.train_iters:
            self._report(run, step)

    def _report(self, run: Run, step: Step) -> None:
        values = self._step_metrics(run, step) | self._interval.metrics(self.cost)
        if self._interval.mean_loss is not None:
            values["train/lm_loss_mean"] = self._interval.mean_loss
        if self._save_s:
            values["runtime/save_time"] = self._save_s
        self.sinks.write(step.iteration, values)
        self._remaining.update(values["runtime/iteration_time"])
        line = progress_line(
            step.iteration,
            run.options.train_iters,
            values,
            mean_loss=self._interval.mean_loss,
            skipped=self._interval.skipped,
            nan=self._interval.nan,
            eta_s=self._remaining.seconds(run.options.train_iters - step.iteration),
        )
        self.console.say(line)
        self._interval, self._save_s = Interval(), 0.0

    @staticmethod
    def _step_metrics(run: Run, step: Step) -> dict[str, float]:
        values = {
            "train/lm_loss": step.loss,
            "train/learning_rate": step.learning_rate,
            "train/grad_norm": step.grad_norm,
            "train/tokens": run.state.consumed_tokens,
            "train/samples": run.state.consumed_samples,
            "train/skipped_iterations": run.state.skipped_iterations,
            "wall_time": time.time(),
        }
        values |= {f"train/{name}": value for name, value in run.engine.loss_parts.items()}
        scale = run.engine.extra_state().get("loss_scale")
        if isinstance(scale, dict) and "value" in scale:
            values["train/loss_scale"] = float(scale["value"])
        return values

    def on_skip(self, run: Run, skip: Skip) -> None:
        """Name the samples, so that somebody can look at them."""
        ids = "; ".join(f"data rank {rank}: {_ranges(own)}" for rank, own in enumerate(skip.sample_ids))
        self.console.say(f"step {skip.iteration} skipped: {skip.reason}; samples of {ids}")

    def on_rewind(self, run: Run, iteration: int) -> None:
        """Say how far back it went."""
        self.console.say(f"rewound to the weights of step {iteration}; data continues after step {run.state.iteration}")

    def on_save(self, run: Run, path: Path, seconds: float) -> None:
        """Print the checkpoint's path; the time is part of the next logged step."""
        self._save_s += seconds
        self.console.say(f"saved {path} in {seconds:.1f} s")

    def on_evaluation(self, run: Run, evaluation: Evaluation) -> None:
        """Log a validation or test result."""
        step = self._last_step
        of_step = self._step_metrics(run, step) if step is not None and step.iteration == run.state.iteration else {}
        self.sinks.write(run.state.iteration, of_step | evaluation.metrics())
        is_best = evaluation.split == "validation" and run.state.best_iteration == run.state.iteration
        best = " (best so far)" if is_best else ""
        right = "" if evaluation.accuracy is None else f"accuracy: {evaluation.accuracy:.4f} | "
        self.console.say(
            f"{evaluation.split} at iteration {run.state.iteration} | lm_loss: {evaluation.loss:.6E} | "
            f"lm_loss_ppl: {evaluation.perplexity:.6E} | {right}{evaluation.seconds:.1f} s{best}"
        )

    def on_end(self, run: Run, outcome: str) -> None:
        """Close the sinks and say how it ended."""
        self.sinks.close()
        self.console.say(f"{outcome} at iteration {run.state.iteration} of {run.options.train_iters}")


def _ranges(ids: Sequence[int]) -> str:
    """`4-7, 12-15` for whole runs of sample numbers."""
    runs: list[list[int]] = []
    for number in ids:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
