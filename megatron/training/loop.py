"""The training loop. Everything else of a run hangs on it as a hook or comes in as a callable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.engine.base import Engine
from megatron.errors import TrainingError
from megatron.training.cadence import every
from megatron.training.evaluate import Evaluation
from megatron.training.feed import Batch, Feed
from megatron.training.hooks import Hook, Hooks, Run, Step
from megatron.training.options import FitOptions
from megatron.training.state import TrainState


@dataclass(frozen=True)
class Actions:
    """What the loop does besides stepping; all ranks must be given the same ones.

    save: writes a checkpoint of the state and returns its folder. validate, test: evaluate on their split.
    """

    save: Callable[[TrainState], Path] | None = None
    validate: Callable[[], Evaluation] | None = None
    test: Callable[[], Evaluation] | None = None


def fit(
    engine: Engine,
    batches: Iterator[Batch],
    schedule: Callable[[int], float],
    state: TrainState,
    options: FitOptions,
    actions: Actions | None = None,
    hooks: Sequence[Hook] = (),
) -> Run:
    """Train until `options.train_iters` or until a stop is asked for; every rank calls this alike.

    Args:
        engine: takes the steps. batches: this rank's micro batches from `state.consumed_samples` on.
        schedule: steps applied so far -> learning rate of the next one.
        state: where the run stands; changed in place. actions, hooks: see there.

    Returns:
        The run: `run.stop` says why it left early (None: it is finished), `run.evaluations` holds the last results.

    Raises:
        TrainingError: a loss or a gradient norm is not finite, or too many steps in a row were skipped. Nothing is
            saved then.
        CheckpointError, DataError: from saving and from the data.
    """
    run = Run(engine, state, options, last_save=state.iteration or None)
    loop = _Loop(run, Feed(batches), schedule, actions or Actions(), Hooks(hooks))
    with loop.hooks.session(run):
        loop.before()
        while state.iteration < options.train_iters and run.stop is None:
            loop.hooks.tell("on_step", run, loop.step())
            if options.save_rule.due(state.iteration):
                loop.save()
            if every(options.eval_interval, state.iteration):
                loop.validate()
            if every(options.exit_interval, state.iteration):
                run.request_stop(f"exit_interval {options.exit_interval}")
        loop.after()
    return run


class _Loop:
    """The parts of an iteration, so that `fit` reads as a list of what happens when."""

    def __init__(self, run: Run, feed: Feed, schedule: Callable[[int], float], actions: Actions, hooks: Hooks) -> None:
        self.run, self.feed, self.schedule, self.actions, self.hooks = run, feed, schedule, actions, hooks
        self.skips_in_a_row = 0
        self.validated_at: int | None = None

    def before(self) -> None:
        """What is due before the first step: a save of step 0, a validation of the untrained model."""
        if self.run.state.iteration == 0 and self.run.options.save_rule.due(0):
            self.save()
        if self.run.options.eval_at_start and self.run.state.iteration < self.run.options.train_iters:
            self.validate()

    def after(self) -> None:
        """The end: a final validation and test of a finished run; in any case a save of what is not saved yet."""
        finished = self.run.stop is None
        if finished and self.validated_at != self.run.state.iteration:
            self.validate()
        if self.run.state.iteration > 0 and self.run.last_save != self.run.state.iteration:
            self.save()
        if finished and self.actions.test is not None:
            self._evaluated(self.actions.test())

    def step(self) -> Step:
        """Take one optimizer step and count it."""
        run, state = self.run, self.run.state
        begin = time.perf_counter()
        self.feed.begin_step()
        rate = self.schedule(state.applied_iterations)
        result = run.engine.train_step(self.feed, rate)
        loss, norm = float(result.loss), float(result.grad_norm)
        seconds = time.perf_counter() - begin
        self._check(loss, norm, result.skipped)
        state.iteration += 1
        state.skipped_iterations += int(result.skipped)
        state.consumed_samples += run.options.samples_per_step
        state.consumed_tokens += run.options.samples_per_step * run.options.seq_length
        ids = tuple(self.feed.sample_ids)
        return Step(state.iteration, loss, norm, rate, result.skipped, seconds, self.feed.wait_s, ids)

    def _check(self, loss: float, norm: float, skipped: bool) -> None:
        self.skips_in_a_row = self.skips_in_a_row + 1 if skipped else 0
        if not math.isfinite(loss):
            raise self._stopped(f"the loss is {loss}")
        if not skipped and not math.isfinite(norm):
            raise self._stopped(f"the gradient norm is {norm}")
        if self.skips_in_a_row >= self.run.options.max_skips:
            raise self._stopped(f"{self.skips_in_a_row} steps in a row were skipped, their gradients were not finite")

    def _stopped(self, what: str) -> TrainingError:
        first, count = self.run.state.consumed_samples, self.run.options.samples_per_step
        own = ", ".join(map(str, self.feed.sample_ids[:16])) + (", ..." if len(self.feed.sample_ids) > 16 else "")
        saved = self.run.last_save
        last = "there is no checkpoint yet" if saved is None else f"the last good checkpoint is of step {saved}"
        return TrainingError(
            f"step {self.run.state.iteration + 1}: {what}",
            where=f"samples {first} to {first + count - 1} of the training data (this rank read {own or 'none'})",
            why="a learning rate that is too high, a damaged sample, or numbers outside the range of the precision",
            hint=f"this step was not saved; {last}",
        )

    def save(self) -> None:
        """Save, unless the run has no place to save to."""
        if self.actions.save is None or not self.run.options.save_rule.enabled:
            return
        begin = time.perf_counter()
        path = self.actions.save(self.run.state)
        self.run.last_save = self.run.state.iteration
        self.hooks.tell("on_save", self.run, path, time.perf_counter() - begin)

    def validate(self) -> None:
        """Validate, if the run has validation data."""
        if self.actions.validate is None:
            return
        self.validated_at = self.run.state.iteration
        self._evaluated(self.actions.validate())

    def _evaluated(self, evaluation: Evaluation) -> None:
        state = self.run.state
        self.run.evaluations[evaluation.split] = evaluation
        if evaluation.split == "validation" and (
            state.best_validation_loss is None or evaluation.loss < state.best_validation_loss
        ):
            state.best_validation_loss, state.best_iteration = evaluation.loss, state.iteration
        self.hooks.tell("on_evaluation", self.run, evaluation)
